"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its variants for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numba import njit
from range_kernels.cpu.kernel_cache import checked_cache

from ...errors import ModelError

_CPU = torch.device("cpu")
_TABLE = 1 << 15
"""Positions whose cosines and sines are kept: 16 MB for 64 pairs."""
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True, eq=False)
class Rope:
    """One rotary embedding: the frequency of each channel pair, and how it changes with the length of the sequence.

    Attributes:
        frequencies: float64 `[pairs]`, radians per position, for sequences of up to `limit` tokens.
        scaling: factor on cosines and sines (YaRN, LongRoPE).
        interleaved: whether a pair is two adjacent channels (GLM) or two channels half the rotated dimension apart.
        limit: number of tokens above which other frequencies apply (dynamic NTK, LongRoPE); None if the length does not matter.
        parameters: from which `of_length` computes the frequencies above `limit`.
    """

    frequencies: torch.Tensor
    scaling: float = 1.0
    interleaved: bool = False
    limit: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    _tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of_length(self, length: int) -> torch.Tensor:
        """The frequencies for a sequence of `length` tokens, float64 `[pairs]`."""
        if self.limit is None or length <= self.limit:
            return self.frequencies
        if self.parameters["rope_type"] == "longrope":
            return self.parameters["long_frequencies"]
        return _dynamic(self.parameters, length)

    def rotation(
        self, positions: torch.Tensor, lengths: torch.Tensor, device: torch.device = _CPU
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (times `scaling`), float32 `[..., pairs]`.

        Angles are computed in float64, since positions grow large, and one by one, so that no result depends on the batch. Those of the
        first positions are kept in a table.

        Args:
            positions: integers `[..., tokens]`, on the CPU.
            lengths: `[tokens]`, the sequence length by which each token's frequencies are chosen.
            device: where the result is.
        """
        end = int(positions.max()) + 1 if positions.numel() else 1
        if end > _TABLE or (self.limit is not None and int(lengths.max()) > self.limit) or int(positions.min()) < 0:
            cosine, sine = self._compute(positions, lengths)
            return cosine.to(device), sine.to(device)
        table = self._tables.get(device)
        if table is None or len(table[0]) < end:
            rows = torch.arange(min(1 << max(end - 1, 1023).bit_length(), _TABLE))
            cosine, sine = self._compute(rows, torch.ones_like(rows))
            table = self._tables[device] = cosine.to(device), sine.to(device)
        indices = positions.to(device)
        return table[0][indices], table[1][indices]

    def _compute(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosine = np.empty((*positions.shape, len(self.frequencies)), np.float32)
        sine = np.empty_like(cosine)
        flat = [x.reshape(-1, x.shape[-1]) for x in (cosine, sine)]
        indices = positions.flatten().numpy()
        if self.limit is None or int(lengths.max()) <= self.limit:
            _fill_cos_sin(indices, np.ones(len(indices), np.bool_), self.frequencies.numpy(), self.scaling, *flat)
        else:
            limited = lengths.expand(positions.shape).flatten().clamp(min=self.limit)
            for length in limited.unique().tolist():
                chosen = (limited == length).numpy()
                _fill_cos_sin(indices, chosen, self.of_length(length).numpy(), self.scaling, *flat)
        return torch.from_numpy(cosine), torch.from_numpy(sine)


@checked_cache
@njit(cache=True)
def _fill_cos_sin(positions, chosen, frequencies, scaling, cosine, sine):
    for token in range(len(positions)):
        if chosen[token]:
            for pair in range(len(frequencies)):
                angle = np.float64(positions[token]) * frequencies[pair]
                cosine[token, pair] = np.float32(math.cos(angle) * scaling)
                sine[token, pair] = np.float32(math.sin(angle) * scaling)


def read_rope(
    config: Any,
    head_dim: int,
    name: str,
    partial: bool = False,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> Rope:
    """Read the rotary embedding from a text configuration.

    Formulas: `modeling_rope_utils` of Transformers 5, which cites the papers.

    Args:
        name: the model's name, for error messages.
        partial: whether this family applies `partial_rotary_factor`, so that only the first channels of a head rotate.
        interleaved: whether a pair is two adjacent channels.
        layer_type: for models whose layers differ (Gemma 3), the kind of layer to read it for.

    Raises:
        ModelError: a kind of scaling, or a combination, that this engine does not support.
    """
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if layer_type is not None:
        rope = dict(rope.get(layer_type) or {})
    kind = rope["rope_type"] = rope.get("rope_type") or "default"
    if kind not in KINDS:
        raise ModelError(
            f"rope_type={kind!r} of {name!r} is not supported by the numba engine: it supports {', '.join(KINDS)}"
        )
    factor = rope.get("partial_rotary_factor", 1.0)
    if not partial and kind != "proportional" and factor != 1.0:
        raise ModelError(
            f"partial_rotary_factor={factor} of {name!r} is not supported by the numba engine for this family"
        )
    dim = int(head_dim * factor) if kind != "proportional" else head_dim
    base = float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    context = int(config.max_position_embeddings)
    original = int(rope.get("original_max_position_embeddings") or context)
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "linear":
        return Rope(plain / rope["factor"], interleaved=interleaved)
    if kind == "llama3":
        return Rope(_llama3(plain, rope, original), interleaved=interleaved)
    if kind == "yarn":
        return Rope(*_yarn(plain, rope, base, context, original), interleaved)
    if kind == "dynamic":
        parameters = {**rope, "base": base, "dim": dim, "context": context}
        return Rope(plain, 1.0, interleaved, context, parameters)
    if kind == "longrope":
        return _longrope(plain, rope, context, original, interleaved)
    if kind == "proportional":
        rotated = int(factor * head_dim // 2)
        nonzero = base ** (-torch.arange(0, 2 * rotated, 2, dtype=torch.float64) / head_dim)
        zero = torch.zeros(head_dim // 2 - rotated, dtype=torch.float64)
        return Rope(torch.cat([nonzero, zero]) / rope.get("factor", 1.0), interleaved=interleaved)
    return Rope(plain, interleaved=interleaved)


def _llama3(frequencies: torch.Tensor, rope: dict, context: int) -> torch.Tensor:
    """Llama 3.1's scaling: frequencies of long wavelengths are divided by `factor`, of short ones kept, between them interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves_in_context = context * frequencies / (2 * math.pi)
    blend = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / rope["factor"])


def _dynamic(parameters: dict[str, Any], length: int) -> torch.Tensor:
    """Dynamic NTK: the base grows with the length once it exceeds the context that the model was trained for."""
    factor, context, dim = parameters["factor"], parameters["context"], parameters["dim"]
    base = parameters["base"] * (factor * length / context - (factor - 1)) ** (dim / (dim - 2))
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _yarn(
    frequencies: torch.Tensor, rope: dict, base: float, context: int, original: int
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): return the frequencies, and the factor on cosines and sines.

    Frequencies of short wavelengths are kept, of long ones divided by `factor`, and interpolated between them.
    """
    factor = rope.get("factor") or context / original
    dim = 2 * len(frequencies)

    def magnitude(ratio: float, weight: float = 1.0) -> float:
        return 1.0 if ratio <= 1 else 0.1 * weight * math.log(ratio) + 1.0

    scaling = rope.get("attention_factor")
    if scaling is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        scaling = magnitude(factor, above) / magnitude(factor, below) if above and below else magnitude(factor)

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1.0 - slowed) + frequencies / factor * slowed, float(scaling)


def _longrope(frequencies: torch.Tensor, rope: dict, context: int, original: int, interleaved: bool) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency has two factors, the second for sequences above `original` tokens."""
    factor = rope.get("factor") or context / original
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (
        frequencies / torch.tensor(rope[name], dtype=torch.float64) for name in ("short_factor", "long_factor")
    )
    return Rope(short, float(scaling), interleaved, original, {"rope_type": "longrope", "long_frequencies": long})


def choose_axes(states: torch.Tensor, sections: tuple[int, ...], interleaved: bool) -> torch.Tensor:
    """M-RoPE (Wang et al. 2024, arXiv:2409.12191): reduce cosines or sines of three axes, `[3, tokens, pairs]`, to `[tokens, pairs]`.

    Each pair is rotated by one axis: time, height or width. The pairs of an axis are consecutive (Qwen2-VL) or interleaved, with
    the remaining pairs rotated by time (Qwen3-VL).

    Args:
        sections: number of pairs per axis.
    """
    if not interleaved:
        parts = states.split(list(sections), dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    chosen = states[0].clone()
    for axis in (1, 2):
        pairs = slice(axis, 3 * sections[axis], 3)
        chosen[..., pairs] = states[axis][..., pairs]
    return chosen
