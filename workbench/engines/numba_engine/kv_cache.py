"""The keys and values of one request."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every layer, `[capacity, kv_heads, head_dim]` each; `length` tokens are filled."""

    def __init__(
        self, layers: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        shape = (layers, capacity, kv_heads, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[tokens, kv_heads, head_dim]` to a layer; return all it holds then. `advance` moves `length` on."""
        end = self.length + len(keys)
        self._keys[layer, self.length : end] = keys
        self._values[layer, self.length : end] = values
        return self._keys[layer, :end], self._values[layer, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as filled, once every layer has them."""
        self.length += tokens
