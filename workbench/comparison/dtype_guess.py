"""Recognise an engine that computes in another dtype than the one that was declared, by the size of its errors."""

from __future__ import annotations

import torch

from .metrics import unit_roundoff

_WITHIN = 10.0
"""How far errors may be from the ratio of two dtypes' roundings: kernels in 16 bits add up in 32, which makes errors a few times smaller."""
_EVEN = 6.0
"""The largest ratio of two taps' errors, in noise floors; a fault that begins somewhere has a larger one."""
_FEWEST = 4
"""Taps besides `embed`: with fewer, a wrong weight looks like another dtype."""
_NAMES = {
    "float64": "float64",
    "float32": "float32",
    "float16": "bfloat16 or float16",
    "bfloat16": "bfloat16 or float16",
}
"""Errors in the two 16-bit dtypes differ by less than their spread."""


def guess_dtype(ratios: torch.Tensor, taps: tuple[str, ...], dtype: str) -> str | None:
    """Return the dtype, or the two, whose rounding explains an engine's errors at every tap better than `dtype` does, or None.

    Args:
        ratios: float64 `[taps, positions]`, errors in noise floors of `dtype`.
        taps: their names.
        dtype: the declared one.
    """
    inside = [row for row, tap in enumerate(taps) if tap != "embed"]  # rows may have been rounded before they came
    if len(inside) < _FEWEST or not torch.isfinite(ratios).all():
        return None
    typical = ratios[inside].quantile(0.5, dim=1)
    if bool((typical <= 0).any()) or float(typical.max() / typical.min()) > _EVEN:
        return None
    size = float(typical.quantile(0.5))
    for other, name in _NAMES.items():
        expected = unit_roundoff(other) / unit_roundoff(dtype)
        if name != _NAMES[dtype] and expected / _WITHIN <= size <= expected * _WITHIN:
            return name
    return None
