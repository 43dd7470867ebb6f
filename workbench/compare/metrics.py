"""How far two hidden states are apart, one number a token."""

from __future__ import annotations

import torch

from .rows import row_sums


def relative_error(state: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`|state - truth| / |truth|` in the 2-norm over the width: float64 `[positions]`.

    Both are `[positions, width]`. Where truth is a row of zeros, the error is 0 if the state is too, else infinity.
    """
    return row_sums(state, truth).relative


def cosine(state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between rows: float64 `[positions]`, at most 1; 0 where a row is zero."""
    return row_sums(state, other).cosine


def unit_roundoff(dtype: str) -> float:
    """Largest relative error of rounding one number to `dtype`: half its machine epsilon."""
    return torch.finfo(getattr(torch, dtype)).eps / 2


def ulp_distance(state: torch.Tensor, truth: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance of every number in units in the last place of `dtype` at the truth: float64 `[positions, width]`.

    The unit at x is the gap between the numbers of `dtype` around x, `2**max(floor(log2 |x|), least exponent) * epsilon`
    (Goldberg 1991, section 1.2; subnormal numbers share the gap of the smallest normal one). Rounding alone makes half a unit.
    """
    info = torch.finfo(getattr(torch, dtype))
    truth = truth.double()
    exponent = (
        torch.frexp(truth.abs().clamp_min(info.smallest_normal)).exponent - 1
    )  # frexp's mantissa lies in [0.5, 1)
    return (state.double() - truth).abs() / torch.ldexp(torch.full_like(truth, info.eps), exponent)


def measure(state: torch.Tensor, truth: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Every metric of a tap, each float64 `[positions]`.

    Returns:
        `relative` (2-norm), `cosine`, `max_abs`, `mean_abs`, and `ulp`: the largest distance in units in the last place of `dtype`.
    """
    sums = row_sums(state, truth)
    return {
        "relative": sums.relative,
        "cosine": sums.cosine,
        "max_abs": sums.max_abs,
        "mean_abs": sums.mean_abs,
        "ulp": ulp_distance(state, truth, dtype).amax(dim=-1),
    }
