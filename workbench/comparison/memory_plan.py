"""What a verdict costs in memory, and which taps are compared if all of them would cost too much."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.base import Engine
from ..prompt import Prompt
from ..trace.taps import EVERY_TAP
from .check import shared_taps, states_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """The taps that a verdict compares.

    Attributes:
        taps: their names.
        nbytes: bytes of their states: the engine's, the reference's in float64, and one run of the noise floor.
        left_out: names of the engine's other taps.
        whole: bytes with all taps.
    """

    taps: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...]
    whole: int


def plan_memory(engine: Engine, prompt: Prompt, limit: int) -> MemoryPlan:
    """Choose the taps of a verdict: all if their states take at most `limit` bytes; else without the logits, whose size is that of the
    vocabulary; else the residual stream only: `embed`, `layers.*` and `norm`.
    """
    every = shared_taps(engine, list(EVERY_TAP))
    whole = states_bytes(engine, prompt, every)
    chosen = every
    if whole > limit:
        chosen = [tap for tap in every if tap != "logits"] or every
        if states_bytes(engine, prompt, chosen) > limit:
            chosen = [tap for tap in chosen if tap.count(".") < 2] or chosen
    left_out = tuple(tap for tap in every if tap not in chosen)
    return MemoryPlan(tuple(chosen), states_bytes(engine, prompt, chosen), left_out, whole)
