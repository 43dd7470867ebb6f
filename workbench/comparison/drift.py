"""Errors that grow slowly and smoothly with the position: an order of summation, not one wrong layer or token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCKS = 8
_FEWEST = 64
"""Positions of a block; a prompt of fewer than `_BLOCKS * _FEWEST` positions shows no trend that chance could not."""
_SPREAD = 6.0
"""The largest ratio of a block over its median: on clean runs, whose cells scatter as rounding does, it is 2 to 4."""
_STEEPEST = 2.0 * (2 * _BLOCKS - 1)
"""The largest growth from the first block to the last: twice that of an error which is proportional to the position."""
_LARGEST = 16.0
"""The largest ratio, in factors of the verdict: rounding that drifts stays small; a wrong mask, page or angle does not."""


@dataclass(frozen=True)
class Drift:
    """An error above the noise that grows with the position at every tap where it exceeds it.

    Attributes:
        tap: the first tap at which it exceeds the noise.
        first, last: the median error of the first and of the last eighth of the positions there, in noise floors.
        largest: the largest error over all taps, in noise floors.
    """

    tap: str
    first: float
    last: float
    largest: float

    def __str__(self) -> str:
        return (
            f"the error grows with the position, from {self.first:.2g} noise floors in the first eighth of the prompt to {self.last:.2g} in the "
            f"last at tap {self.tap} (largest: {self.largest:.3g}): an order of summation over the keys, or angles in a lower precision, "
            "rather than one wrong layer or token"
        )


def find_drift(ratios: torch.Tensor, wrong: torch.Tensor, taps: tuple[str, ...], factor: float) -> Drift | None:
    """Return the drift that explains all wrong cells, or None.

    Args:
        ratios: float64 `[taps, positions]`, errors in noise floors, positions in order.
        wrong: bool, of the same shape: the cells above the noise.
        factor: largest ratio that counts as noise.
    """
    rows = wrong.any(dim=1).nonzero().flatten().tolist()
    positions = ratios.shape[1]
    if (
        not rows
        or positions < _BLOCKS * _FEWEST
        or not torch.isfinite(ratios).all()
        or ratios.max() > _LARGEST * factor
    ):
        return None
    size = positions // _BLOCKS
    blocks = ratios[rows][:, positions - size * _BLOCKS :].reshape(len(rows), _BLOCKS, size)
    medians = blocks.quantile(0.5, dim=2)
    smooth = (blocks.amax(dim=2) <= _SPREAD * medians).all()
    growing = (medians[:, 1:] >= 0.75 * medians[:, :-1]).all() and (medians[:, -1] >= 2.0 * medians[:, 0]).all()
    slow = (medians[:, -1] <= _STEEPEST * medians[:, 0]).all() and (medians[:, 0] <= factor).all()
    # What the blocks leave out, the first few positions, must be right.
    rest = not wrong[:, : positions - size * _BLOCKS].any()
    if not (smooth and growing and slow and rest):
        return None
    return Drift(taps[rows[0]], float(medians[0, 0]), float(medians[0, -1]), float(ratios.max()))
