"""Sums over rows of two states in one pass: what every metric of a tap is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch


@dataclass(frozen=True)
class RowSums:
    """One float64 number a row, `[positions]`: norms in the 2-norm over the width."""

    difference: torch.Tensor
    truth: torch.Tensor
    state: torch.Tensor
    dot: torch.Tensor
    max_abs: torch.Tensor
    mean_abs: torch.Tensor

    @property
    def relative(self) -> torch.Tensor:
        """`|state - truth| / |truth|`; where truth is a row of zeros, 0 if the state is too, else infinity."""
        return torch.where(self.difference == 0.0, 0.0, self.difference / self.truth)

    @property
    def cosine(self) -> torch.Tensor:
        """Cosine of the angle between the rows, at most 1; 0 where one of them is zero."""
        size = self.truth * self.state
        return torch.where(size == 0.0, 0.0, self.dot / size).clamp(-1.0, 1.0)


def row_sums(state: torch.Tensor, truth: torch.Tensor) -> RowSums:
    """Compare two states `[positions, width]`; sums run in float64."""
    out = np.empty((6, len(truth)))
    if state.shape != truth.shape:
        raise ValueError(f"states of different shapes: {tuple(state.shape)} and {tuple(truth.shape)}")
    _sums(_readable(state), _readable(truth), out)
    difference, size, other, dot, largest, total = torch.from_numpy(out)
    mean = total / max(truth.shape[1], 1)
    return RowSums(difference.sqrt(), size.sqrt(), other.sqrt(), dot, largest, mean)


def _readable(state: torch.Tensor) -> np.ndarray:
    """As NumPy, in a type that it has; half types are widened, which is exact."""
    state = state.detach()
    return (state.float() if state.dtype.itemsize == 2 else state).contiguous().numpy()


# Sums may be reordered, nothing else: a NaN must come out as one.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _sums(state, truth, out):
    for row in range(truth.shape[0]):
        difference = size = other = dot = total = 0.0
        for at in range(truth.shape[1]):
            a, b = np.float64(state[row, at]), np.float64(truth[row, at])
            d = a - b
            difference += d * d
            size += b * b
            other += a * a
            dot += a * b
            total += abs(d)
        largest = np.nan
        if difference == difference:
            largest = 0.0
            for at in range(truth.shape[1]):
                largest = max(largest, abs(np.float64(state[row, at]) - np.float64(truth[row, at])))
        out[0, row], out[1, row], out[2, row] = difference, size, other
        out[3, row], out[4, row], out[5, row] = dot, largest, total
