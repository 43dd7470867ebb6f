"""Errors that grow slowly and smoothly with the position: an order of summation, not one wrong layer or token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCKS = 8
_FEWEST = 64
"""Positions of a block; a prompt of fewer than `_BLOCKS * _FEWEST` positions shows no trend that chance could not."""
_SPREAD = 4.0
"""The largest ratio among `_FEWEST` neighbours over their median; on clean runs the largest ratio of all cells is about three medians."""
_GROWING = 1.3
"""Growth from the first block to the last of a tap that takes part in the drift, though it is not above the noise."""
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
    near = ratios[rows][:, positions % _FEWEST :].reshape(len(rows), -1, _FEWEST)
    smooth = (near.amax(dim=2) <= _SPREAD * near.quantile(0.5, dim=2)).all()
    jumps = medians[:, 1:] / medians[:, :-1]
    growing = ((jumps >= 0.75) & (jumps <= 3.0)).all() and (medians[:, -1] >= 2.0 * medians[:, 0]).all()
    slow = (medians[:, -1] <= _STEEPEST * medians[:, 0]).all() and (medians[:, 0] <= factor).all()
    # What the blocks leave out, the first few positions, must be right.
    rest = not wrong[:, : positions - size * _BLOCKS].any()
    if not (smooth and growing and slow and rest and _grows_before(ratios, rows[0], taps, size)):
        return None
    return Drift(taps[rows[0]], float(medians[0, 0]), float(medians[0, -1]), float(ratios.max()))


def _grows_before(ratios: torch.Tensor, first: int, taps: tuple[str, ...], size: int) -> bool:
    """Whether most taps before the first wrong one grow too: a drift begins in the first attention, a wrong layer at that layer."""
    before = [row for row in range(first) if taps[row] != "embed"]
    if not before:
        return True
    begin, end = ratios[before, :size].quantile(0.5, dim=1), ratios[before, -size:].quantile(0.5, dim=1)
    return bool((end >= _GROWING * begin).double().mean() > 0.5)
