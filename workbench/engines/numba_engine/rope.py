"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways checkpoints stretch it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import ModelError


def inverse_frequencies(config) -> torch.Tensor:
    """Angle per position of each rotated pair, float64 `[head_dim / 2]`.

    Raises:
        ModelError: a kind of scaling this engine does not have.
    """
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    theta = float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported by the numba engine")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        return _llama3(frequencies, rope)
    raise ModelError(f"rope_type={kind!r} is not supported by the numba engine, which has default, linear and llama3")


def _llama3(frequencies: torch.Tensor, rope: dict) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between blended by wavelength."""
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves_in_context = context * frequencies / (2 * math.pi)
    blend = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / rope["factor"])


def rotation(
    frequencies: torch.Tensor, positions: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 `[tokens, 1, head_dim / 2]`; angles are taken in float64, as positions grow large."""
    angles = positions.to(torch.float64)[:, None, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim/2) of `x` `[tokens, heads, head_dim]` in float32; returns the dtype of `x`."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
