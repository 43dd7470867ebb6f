"""Where chosen tokens attend to, layer by layer and head by head, summed up by embedding range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engines.attention_weights import AttentionRows
from ..engines.base import Engine
from ..engines.numba_engine.attention_rows import attention_rows
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.transformers.attention_weights import reference_attention
from ..engines.transformers.reference import TransformersReference
from ..errors import ModelError
from ..prompt import Prompt

SINKS = 4
"""The first tokens of a prompt, to which heads attend that have nothing to attend to (Xiao et al. 2024, arXiv:2309.17453)."""


@dataclass(frozen=True)
class Attention:
    """Attention of the queries at some positions of a prompt in some layers.

    Attributes:
        groups: names of the groups of keys: "sinks" (the first `SINKS` tokens outside ranges), one per embedding range, "text".
        members: bool `[groups, keys]`; every key is in one group.
        layers: for each layer its `AttentionRows`, with weights `[queries, q_heads, keys]`.
    """

    prompt: Prompt
    groups: tuple[str, ...]
    members: np.ndarray
    layers: dict[int, AttentionRows]

    def by_group(self) -> np.ndarray:
        """The share of each group in the attention, float64 `[layers, queries, q_heads, groups]`; a row of groups sums to 1."""
        members = torch.from_numpy(self.members.T).double()
        return torch.stack([rows.weights @ members for rows in self.layers.values()]).numpy()

    def __str__(self) -> str:
        shares = self.by_group().mean(axis=2)
        lines = [f"{'':24}" + "".join(f"{name:>12}" for name in self.groups)]
        for number, (layer, rows) in enumerate(self.layers.items()):
            for query, position in enumerate(rows.positions):
                cells = "".join(f"{share:12.1%}" for share in shares[number, query])
                lines.append(f"layer {layer:3}, token {position:6} {cells}")
        return "\n".join(lines)


def attention_of(engine: Engine, prompt: Prompt, layers: Sequence[int], positions: Sequence[int] = (-1,)) -> Attention:
    """Compute the attention weights of the tokens at `positions` in `layers`, as the engine's model computes them.

    Raises:
        ModelError: an engine that does not expose its queries and keys.
        ValueError, TraceError, EmbeddingRangeError, PromptError: as in `attention_rows` and `reference_attention`.
    """
    groups, members = key_groups(prompt)
    if isinstance(engine, NumbaEngine):
        return Attention(prompt, groups, members, attention_rows(engine, prompt, layers, positions))
    if isinstance(engine, TransformersReference):
        return Attention(prompt, groups, members, reference_attention(engine, prompt, layers, positions))
    raise ModelError(f"{engine.capabilities.name} does not expose queries and keys: open 'numba' or 'transformers'")


def key_groups(prompt: Prompt) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and members, bool `[groups, keys]`, of the groups of a prompt's tokens; see `Attention`."""
    length = len(prompt)
    inside = np.zeros((len(prompt.embedding_ranges), length), bool)
    for number, (start, stop) in enumerate(prompt.embedding_ranges):
        inside[number, start:stop] = True
    outside = ~inside.any(axis=0)
    sinks = outside & (np.arange(length) < SINKS)
    labels = [span.label for span in prompt.spans] or [""] * len(inside)
    taken = [*labels, "sinks", "text", "last token"]
    names = [
        (label if taken.count(label) == 1 else f"{label} {number}") if label else f"range {number}"
        for number, label in enumerate(labels)
    ]
    return ("sinks", *names, "text"), np.stack([sinks, *inside, outside & ~sinks])
