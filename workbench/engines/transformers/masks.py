"""Masks for Transformers' decoders, written out: causal attention with bidirectional spans."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import EmbeddingRangeError


def takes_masks(decoder: Any) -> bool:
    """Whether a decoder takes a prepared mask `[1, 1, seq, seq]`: those do that make theirs with Transformers' `create_causal_mask`."""
    return hasattr(sys.modules[type(decoder).__module__], "create_causal_mask")


def span_mask(
    config: Any, length: int, spans: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return an additive mask `[1, 1, seq, seq]`, or one mask for each kind of layer of a decoder's configuration.

    A token attends to a key if the key is not later or in the same bidirectional span, and inside the layer's window.
    Transformers also limits spans to the window (`create_sliding_window_causal_mask`); in vLLM a span may extend beyond it.

    Raises:
        EmbeddingRangeError: the decoder has layers of a kind whose masks are not known.
    """
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop in spans:
        visible[start:stop, start:stop] = True

    def additive(seen: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(device)

    window = getattr(config, "sliding_window", None)
    positions = torch.arange(length)
    near = visible & (positions[:, None] - positions < window) if window else visible
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds <= {"full_attention"}:
        return additive(near if window and not kinds else visible)
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise EmbeddingRangeError(f"bidirectional spans on layers of kind {sorted(unknown)[0]!r} are not supported")
    return {"full_attention": additive(visible), "sliding_attention": additive(near)}
