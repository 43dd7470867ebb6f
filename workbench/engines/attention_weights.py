"""Attention weights of chosen queries in one layer, and the checks before an engine computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..errors import TraceError


@dataclass(frozen=True)
class AttentionRows:
    """Attention of some queries in one layer.

    Attributes:
        layer: number of the layer; positions: the queries' positions in the prompt.
        weights: float64 `[queries, q_heads, keys]`, exactly 0 for keys that a query does not see.
        visible: bool `[queries, keys]`; of the reference, the keys that have a weight above 0 in any head.
        values: float64 `[keys, kv_heads, head_dim]`; None from the reference.
    """

    layer: int
    positions: tuple[int, ...]
    weights: torch.Tensor
    visible: torch.Tensor
    values: torch.Tensor | None


def check_attention(layers: Sequence[int], positions: Sequence[int], length: int, count: int, nbytes: int) -> list[int]:
    """Check what was asked of a model of `count` layers and a prompt of `length` tokens; return positions counted from the start.

    Args:
        nbytes: memory that the weights take.

    Raises:
        ValueError: a layer or position that does not exist.
        TraceError: the weights do not fit into half of the free memory.
    """
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layer {layer}: the model has layers 0 to {count - 1}")
    if not layers or not positions or not all(-length <= position < length for position in positions):
        raise ValueError(
            f"layers {list(layers)}, positions {list(positions)}: give positions in the prompt of {length} tokens"
        )
    if nbytes > psutil.virtual_memory().available // 2:
        raise TraceError(
            f"the weights take {nbytes / 1e9:.1f} GB, more than half of the free memory: choose fewer layers or positions"
        )
    return [position % length for position in positions]
