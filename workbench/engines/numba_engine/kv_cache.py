"""The keys and values of one request, and of several whose tokens run packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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

    def bounds(self, tokens: int) -> tuple[Sequence[int], Sequence[int]]:
        """Cumulative lengths of queries and keys, when `tokens` come after what is held."""
        return (0, tokens), (0, self.length + tokens)


class PackedCache:
    """The caches of several requests, each of which runs `sizes[i]` new tokens, laid end to end.

    What a request holds already is joined with its new tokens, so whole prompts cost no copy and chunks cost one.
    """

    def __init__(self, caches: Sequence[KVCache], sizes: Sequence[int]) -> None:
        self.caches, self.sizes = list(caches), list(sizes)

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append packed `[tokens, kv_heads, head_dim]`, each request's to its own cache; return all, packed."""
        parts = zip(self.caches, keys.split(self.sizes), values.split(self.sizes), strict=True)
        held = [cache.extend(layer, own_keys, own_values) for cache, own_keys, own_values in parts]
        if all(cache.length == 0 for cache in self.caches):
            return keys, values
        return torch.cat([keys for keys, _ in held]), torch.cat([values for _, values in held])

    def advance(self, tokens: int) -> None:
        """Count the new tokens as filled in every cache."""
        for cache, size in zip(self.caches, self.sizes, strict=True):
            cache.advance(size)

    def bounds(self, tokens: int) -> tuple[Sequence[int], Sequence[int]]:
        """Cumulative lengths of queries and keys."""
        held = [cache.length + size for cache, size in zip(self.caches, self.sizes, strict=True)]
        return [0, *accumulate(self.sizes)], [0, *accumulate(held)]
