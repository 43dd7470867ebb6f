"""How far two hidden states are apart, one number a token."""

from __future__ import annotations

import torch


def relative_error(state: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`|state - truth| / |truth|` in the 2-norm over the width: float64 `[positions]`.

    Both are `[positions, width]`. Where truth is a row of zeros, the error is 0 if the state is too, else infinity.
    """
    state, truth = state.double(), truth.double()
    difference = torch.linalg.vector_norm(state - truth, dim=-1)
    size = torch.linalg.vector_norm(truth, dim=-1)
    return torch.where(difference == 0.0, 0.0, difference / size)


def cosine(state: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between rows: float64 `[positions]`, at most 1."""
    return torch.nn.functional.cosine_similarity(state.double(), other.double(), dim=-1).clamp(-1.0, 1.0)


def unit_roundoff(dtype: str) -> float:
    """Largest relative error of rounding one number to `dtype`: half its machine epsilon."""
    return torch.finfo(getattr(torch, dtype)).eps / 2
