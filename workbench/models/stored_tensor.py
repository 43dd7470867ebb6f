"""A weight of a checkpoint that is read on demand: as it is stored, or dequantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .checkpoint import Entry


@dataclass(frozen=True)
class StoredTensor:
    """A weight that `read` returns.

    Attributes:
        shape, dtype: of what `read` returns.
        read: reads it; raises ModelError.
        entries: where the bytes that it is made from are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    entries: tuple[Entry, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read from the checkpoint."""
        return sum(entry.bytes for entry in self.entries)
