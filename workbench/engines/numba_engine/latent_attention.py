"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434): queries, keys and values from narrow latents."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .architectures import LatentConfig
from .ops import Linear
from .weights import TensorReader

_EPSILON = 1e-6  # of the latents' norms, whatever the model's


class Projected(NamedTuple):
    """Queries and keys, one after the other, `[tokens, 2 * heads, qk_dim]`, their rotated channels first; values `[tokens, heads, value_dim]`."""

    heads: torch.Tensor
    values: torch.Tensor


class LatentAttention:
    """What one layer computes between its first product and attention.

    The KV cache holds whole keys and values, as for other models, not the latents.

    Attributes:
        query_norm: `[query_rank]`, query_up: query_rank -> heads * qk_dim; None if queries have no latent.
        kv_norm: `[kv_rank]`; kv_up: kv_rank -> heads * (plain_dim + value_dim).
    """

    def __init__(self, read: TensorReader, at: str, heads: int, settings: LatentConfig, ops: Any) -> None:
        self.settings, self.heads, self._ops = settings, heads, ops
        self.query_norm, self.kv_norm = read.latent_norms(at, settings)
        query_up, kv_up = read.latent_up(at, settings)
        self.query_up: Linear | None = None if query_up is None else ops.linear(query_up)
        self.kv_up: Linear = ops.linear(kv_up)

    def tensors(self) -> list[torch.Tensor]:
        """All weights, kept as torch tensors."""
        up = [each.weight for each in (self.query_up, self.kv_up) if each is not None]
        return [*up, *(each for each in (self.query_norm, self.kv_norm) if each is not None)]

    def __call__(self, x: torch.Tensor) -> Projected:
        """The first product's result `[tokens, queries + kv_rank + rotated_dim]` -> queries, keys and values."""
        it = self.settings
        queries, latent, rotated = x.split(
            [x.shape[1] - it.kv_rank - it.rotated_dim, it.kv_rank, it.rotated_dim], dim=1
        )
        if self.query_up is not None:
            queries = self.query_up(self._ops.norm(queries.contiguous(), self.query_norm, _EPSILON))
        both = self.kv_up(self._ops.norm(latent.contiguous(), self.kv_norm, _EPSILON))
        plain, values = both.view(len(x), self.heads, -1).split([it.plain_dim, it.value_dim], dim=2)
        q = queries.reshape(len(x), self.heads, -1)
        # Scores do not depend on the order of channels; the rotation takes the first ones.
        q = torch.cat([q[..., it.plain_dim :], q[..., : it.plain_dim]], dim=2)
        k = torch.cat([rotated[:, None].expand(-1, self.heads, -1), plain], dim=2)
        return Projected(torch.cat([q, k], dim=1), values)

    @staticmethod
    def padded(x: torch.Tensor, width: int) -> torch.Tensor:
        """Heads with zeros up to `width` channels, which the KV cache has."""
        return x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2]))
