"""Doubtful verdicts: an error a little above the noise is judged again by a noise floor of more runs.

At a few tokens, those with massive activations, the error has hardly more than one direction, so that it is one random number. The
largest of four such numbers is sometimes ten times smaller than usual; the largest of sixteen is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..trace import Trace
from .noise_floor import NoiseFloor
from .verdict import Comparison, compare

DOUBT_RUNS = 16
_DOUBTFUL = 8.0
"""In factors of the verdict: sixteen runs instead of four do not make a floor larger than that, so a larger error needs no more runs."""


def compare_with_doubt(
    expected: Trace, run: Trace, floor: NoiseFloor, factor: float, more: Callable[[int], NoiseFloor]
) -> Comparison:
    """`compare`; if the verdict is "bug" and doubtful, again with the noise floor `more(DOUBT_RUNS)`, which is measured with that many runs."""
    comparison = compare(expected, run, floor=floor, factor=factor)
    if comparison.verdict != "bug" or not _is_doubtful(comparison):
        return comparison
    return compare(expected, run, floor=more(DOUBT_RUNS), factor=factor)


def _is_doubtful(comparison: Comparison) -> bool:
    largest = comparison.ratios.max()
    return bool(torch.isfinite(comparison.ratios).all()) and float(largest) <= _DOUBTFUL * comparison.factor
