"""Cut sequences into tiles of queries for the blocks of a prefill kernel; planned on the host, read on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch


def cut(begin: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """Cut the queries `[begin, stop)` into tiles of `rows`; return first query and number of queries of each.

    If `rows` does not divide their number, the first tile is the short one, because its queries see the fewest keys.
    """
    short = (stop - begin) % rows
    starts = [*([begin] if short else []), *range(begin + short, stop + 1, rows)]
    return [(start, end - start) for start, end in pairwise(starts)]


def plan_tiles(cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], rows: int) -> np.ndarray:
    """Return int32 `[tiles, 4]` for packed sequences: first query, number of queries, first key, keys of the sequence."""
    tiles = [
        (start, count, first, last - first)
        for (begin, stop), (first, last) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
        for start, count in cut(begin, stop, rows)
    ]
    return np.asarray(tiles, dtype=np.int32).reshape(-1, 4)


def device_tiles(cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray, rows: int, device: torch.device) -> torch.Tensor:
    """Return `plan_tiles` as a tensor on `device`, for use on the current stream.

    Cached: all layers of a step use the same tiles.
    """
    tiles = _planned(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()), rows, device)
    # The cache may free them while this stream or a captured graph still reads them.
    if torch.cuda.is_current_stream_capturing():
        _kept_for_graphs[tiles.data_ptr()] = tiles
    else:
        tiles.record_stream(torch.cuda.current_stream(device))
    return tiles


@lru_cache(maxsize=128)
def _planned(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], rows: int, device: torch.device
) -> torch.Tensor:
    return torch.from_numpy(plan_tiles(cu_seqlens_q, cu_seqlens_k, rows)).to(device)


_kept_for_graphs: dict[int, torch.Tensor] = {}
"""Tiles that a captured CUDA graph reads by address: never freed, as the end of a graph is not reported; 16 bytes
per tile."""
