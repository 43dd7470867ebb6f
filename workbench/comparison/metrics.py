"""Distances between two hidden states: one number per token, or, for `ulp_distance`, per element."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from range_kernels.cpu.kernel_cache import checked_cache


def relative_error(state: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`|state - reference| / |reference|` per row of `[positions, width]`, in the 2-norm: float64 `[positions]`.

    For a reference row of zeros, the error is 0 if the state is zero too, else infinity.
    """
    return row_sums(state, reference).relative


def cosine(state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between the rows of two states `[positions, width]`: float64 `[positions]`; 0 if either row is zero."""
    return row_sums(state, other).cosine


def unit_roundoff(dtype: str) -> float:
    """Largest relative error of rounding one number to `dtype`: half its machine epsilon."""
    return torch.finfo(getattr(torch, dtype)).eps / 2


def ulp_distance(state: torch.Tensor, reference: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance of each element from the reference, in units in the last place (ulp) of `dtype`: float64 `[positions, width]`.

    The unit is that of the reference's element x: the gap between the numbers of `dtype` around it, `2**max(floor(log2 |x|), least exponent) * epsilon`
    (Goldberg 1991, section 1.2; subnormal numbers share the gap of the smallest normal one).
    Rounding changes a number by at most half a unit.
    """
    info = torch.finfo(getattr(torch, dtype))
    reference = reference.double()
    exponent = (
        torch.frexp(reference.abs().clamp_min(info.smallest_normal)).exponent - 1
    )  # frexp's mantissa is in [0.5, 1)
    return (state.double() - reference).abs() / torch.ldexp(torch.full_like(reference, info.eps), exponent)


def measure(state: torch.Tensor, reference: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Compute every metric for two states `[positions, width]`, each per row: float64 `[positions]`.

    Returns:
        `relative` (error in the 2-norm), `cosine`, `max_abs` and `mean_abs` (largest and mean absolute difference), and `ulp` (largest
        difference in units in the last place of `dtype`).
    """
    sums = row_sums(state, reference)
    return {
        "relative": sums.relative,
        "cosine": sums.cosine,
        "max_abs": sums.max_abs,
        "mean_abs": sums.mean_abs,
        "ulp": ulp_distance(state, reference, dtype).amax(dim=-1),
    }


@dataclass(frozen=True)
class RowSums:
    """Sums over the width of two states, each float64 `[positions]`.

    Attributes:
        difference, reference, state: 2-norms of `state - reference`, of the reference and of the state.
        dot: dot product of state and reference.
        max_abs, mean_abs: largest and mean absolute difference.
    """

    difference: torch.Tensor
    reference: torch.Tensor
    state: torch.Tensor
    dot: torch.Tensor
    max_abs: torch.Tensor
    mean_abs: torch.Tensor

    @property
    def relative(self) -> torch.Tensor:
        """`|state - reference| / |reference|`; for a reference row of zeros, 0 if the state is zero too, else infinity."""
        return torch.where(self.difference == 0.0, 0.0, self.difference / self.reference)

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine of the angle between the rows, at most 1; 0 if either is zero."""
        size = self.reference * self.state
        return torch.where(size == 0.0, 0.0, self.dot / size).clamp(-1.0, 1.0)


def row_sums(state: torch.Tensor, reference: torch.Tensor) -> RowSums:
    """Compute the row sums of two states `[positions, width]` of any float dtypes, in float64.

    Raises:
        ValueError: the shapes differ.
    """
    out = np.empty((6, len(reference)))
    if state.shape != reference.shape:
        raise ValueError(f"states of different shapes: {tuple(state.shape)} and {tuple(reference.shape)}")
    _sums(_readable(state), _readable(reference), out)
    difference, size, other, dot, largest, total = torch.from_numpy(out)
    mean = total / max(reference.shape[1], 1)
    return RowSums(difference.sqrt(), size.sqrt(), other.sqrt(), dot, largest, mean)


def _readable(state: torch.Tensor) -> np.ndarray:
    """Convert to NumPy; 16-bit floats are widened to float32, which is exact (NumPy has no bfloat16)."""
    state = state.detach()
    return (state.float() if state.dtype.itemsize == 2 else state).contiguous().numpy()


# Of the fast-math flags only those that reorder and fuse operations: with others, NaN might not stay NaN.
@checked_cache
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _sums(state, reference, out):
    for row in range(reference.shape[0]):
        difference = size = other = dot = total = 0.0
        for at in range(reference.shape[1]):
            a, b = np.float64(state[row, at]), np.float64(reference[row, at])
            d = a - b
            difference += d * d
            size += b * b
            other += a * a
            dot += a * b
            total += abs(d)
        largest = np.nan
        if difference == difference:
            largest = 0.0
            for at in range(reference.shape[1]):
                largest = max(largest, abs(np.float64(state[row, at]) - np.float64(reference[row, at])))
        out[0, row], out[1, row], out[2, row] = difference, size, other
        out[3, row], out[4, row], out[5, row] = dot, largest, total
