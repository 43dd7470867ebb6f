"""What an injection changes: hidden states and next tokens of a run with embeddings compared with the run without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engines.base import TAPS, Engine
from ..prompt import Prompt
from ..trace import Trace
from .state_maps import state_maps


@dataclass(frozen=True)
class InjectionEffect:
    """The effect of one injection.

    Attributes:
        tokens: the text of each token of the prompt.
        ranges: its embedding ranges.
        taps: names of the hidden states, the rows of the maps.
        change, cosine: float32 `[taps, tokens]`: relative change of each state by the embeddings, and its cosine with the state without.
        next_tokens: text of the likeliest next tokens of both runs.
        without, injected: their probabilities in the run without embeddings, and in the run with them.
    """

    tokens: Sequence[str]
    ranges: Sequence[tuple[int, int]]
    taps: Sequence[str]
    change: np.ndarray
    cosine: np.ndarray
    next_tokens: Sequence[str]
    without: Sequence[float]
    injected: Sequence[float]


def injection_effect(
    engine: Engine, prompt: Prompt, without: Trace | None = None, count: int = 3
) -> tuple[InjectionEffect, Trace]:
    """Run `prompt` with its embeddings and without them, and compare hidden states and next tokens.

    Args:
        without: the trace of `prompt.without_embeddings`, if it was already computed; a trace of another prompt is not used.
        count: how many of each run's likeliest next tokens to keep.

    Returns:
        the effect, and the trace without embeddings, for the next call.
    """
    plain = prompt.without_embeddings
    if without is None or without.provenance["prompt"] != plain.digest:
        without = engine.trace(plain, TAPS)
    injected = engine.trace(prompt, TAPS)
    maps = state_maps(engine, injected, without, prompt)
    chances = [trace["logits"][-1].float().softmax(dim=-1) for trace in (without, injected)]
    likeliest = list(dict.fromkeys(token for chance in chances for token in chance.topk(count).indices.tolist()))
    effect = InjectionEffect(
        maps.tokens,
        maps.ranges,
        maps.taps,
        maps.values["change"],
        maps.values["cosine"],
        engine.model.tokens(likeliest),
        *(chance[likeliest].tolist() for chance in chances),
    )
    return effect, without
