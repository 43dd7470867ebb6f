"""Tiles of queries: what a block of a prefill kernel computes, for all heads or one. Planned on the host, read on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch


def cut(begin: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """First query and queries of each tile of a sequence; one with fewer than `rows` is the first, which sees the fewest keys."""
    short = (stop - begin) % rows
    starts = [*([begin] if short else []), *range(begin + short, stop + 1, rows)]
    return [(start, end - start) for start, end in pairwise(starts)]


def plan_tiles(lengths_q: Sequence[int], lengths_k: Sequence[int], rows: int) -> np.ndarray:
    """First query, queries, first key, keys of the sequence; int32 `[tiles, 4]`, of sequences that lie end to end."""
    tiles = [
        (start, count, first, last - first)
        for (begin, stop), (first, last) in zip(pairwise(lengths_q), pairwise(lengths_k), strict=True)
        for start, count in cut(begin, stop, rows)
    ]
    return np.asarray(tiles, dtype=np.int32).reshape(-1, 4)


def device_tiles(lengths_q: np.ndarray, lengths_k: np.ndarray, rows: int, device: torch.device) -> torch.Tensor:
    """`plan_tiles` on the device, for the current stream; every layer of a step asks for the same."""
    tiles = _planned(tuple(lengths_q.tolist()), tuple(lengths_k.tolist()), rows, device)
    # The cache may let go of them while this stream or a captured graph still reads them.
    if torch.cuda.is_current_stream_capturing():
        _of_graphs[tiles.data_ptr()] = tiles
    else:
        tiles.record_stream(torch.cuda.current_stream(device))
    return tiles


@lru_cache(maxsize=128)
def _planned(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], rows: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(plan_tiles(lengths_q, lengths_k, rows)).to(device)


_of_graphs: dict[int, torch.Tensor] = {}
"""Tiles whose addresses are part of a captured graph, which nobody hears ending: kept for good, 16 bytes a tile."""
