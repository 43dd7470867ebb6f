"""Select the prompt positions that a trace keeps."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch


def choose_positions(positions: slice | Sequence[int], length: int) -> torch.Tensor:
    """Convert a slice or indices (negative ones count from the end) to the prompt positions to keep, int64 `[kept]`.

    Raises:
        ValueError: a position outside the prompt of `length` tokens, none at all, or values that are not integers.
    """
    every = torch.arange(length)
    if isinstance(positions, slice):
        kept = every[positions]
    else:
        try:
            wanted = [operator.index(position) for position in positions]
        except TypeError as error:
            raise ValueError(f"positions={positions!r}: give a slice or a list of integers") from error
        outside = [position for position in wanted if not -length <= position < length]
        if outside:
            raise ValueError(f"positions {outside} leave the prompt of {length} tokens")
        kept = every[wanted]
    if not len(kept):
        raise ValueError(f"positions={positions!r} keep none of the {length} tokens")
    return kept
