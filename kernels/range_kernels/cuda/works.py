"""The works of a kernel whose blocks outlive a tile: each a tile of queries of one head, and what a block notes of it.

    blocks as many as multiprocessors; the first work is the block's own number, the next comes from a counter that all share
    the warpgroup that copies notes a work, a work ahead of the one that it copies for; the others read

A note is `Notes.size` int32 in shared memory: what the names below say, then of each warpgroup's 64 queries the smallest `low` and the
largest `reach`, then `low` and `reach` of every query. There are `NOTES` of them, in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import cuda, int32, uint32, uint64

from .ptx import divide, load_int
from .ptx_hopper import barrier_arrive, barrier_wait, meet

NOTES = 4
HEAD, Q_FIRST, QUERIES, K_FIRST, KEYS = range(5)  # of a note; the head is -1 where there is no work left
_BOUNDS = 8
_ROWS = 16
_NOWHERE = 1 << 30


@dataclass(frozen=True)
class Notes:
    """Where things lie in a note."""

    rows: int
    bounds: int = _BOUNDS
    lows: int = _ROWS

    @property
    def reaches(self) -> int:
        return _ROWS + self.rows

    @property
    def size(self) -> int:
        return _ROWS + 2 * self.rows


@cache
def make_note(rows: int, threads: int, barrier: int) -> Any:
    """The device function by which `threads` threads, who meet at a named barrier, note a work."""
    at = Notes(rows)
    size, bounds_at, lows_at, reaches_at = at.size, at.bounds, at.lows, at.reaches
    bounds, nowhere = 2 * (rows // 64), _NOWHERE
    head_at, q_first_at, queries_at, k_first_at, keys_at = HEAD, Q_FIRST, QUERIES, K_FIRST, KEYS

    @cuda.jit(device=True, inline="always")
    def note(notes, here, read, number, work, works, heads, tiles, low, reach, thread):
        """`here`, `read`: addresses of the barriers of notes that are there and that have been read, 8 bytes each."""
        slot = int32(number & (NOTES - 1))
        base = int32(slot * size)
        if number >= NOTES:
            barrier_wait(read + uint32(8 * slot), uint32(((number >> 2) - 1) & 1))
        if work >= works:
            if thread == 0:
                notes[base + head_at] = int32(-1)
            meet(barrier, threads)
        else:
            row_of_heads = divide(work, heads)
            last_tile = divide(int32(works - 1), heads)
            entry = tiles + uint64(16) * uint64(int32(last_tile - row_of_heads))  # late queries see most keys: they come first
            q_first, count = load_int(entry), load_int(entry + uint64(4))
            k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
            if thread < bounds:
                notes[base + bounds_at + thread] = int32(-1) if thread & 1 else int32(nowhere)
            meet(barrier, threads)
            for part in range((rows + threads - 1) // threads):
                row = int32(part * threads + thread)
                if row < rows:
                    first, last = int32(nowhere), int32(-1)
                    if row < count:
                        place = uint64(4) * uint64(int32(q_first + row))
                        first, last = max(load_int(low + place), int32(0)), min(load_int(reach + place), int32(k_count - 1))
                        if first <= last:
                            cuda.atomic.min(notes, base + bounds_at + 2 * (row >> 6), first)
                            cuda.atomic.max(notes, base + bounds_at + 1 + 2 * (row >> 6), last)
                    notes[base + lows_at + row] = first
                    notes[base + reaches_at + row] = last
            if thread == 0:
                notes[base + head_at] = int32(work - row_of_heads * heads)
                notes[base + q_first_at] = q_first
                notes[base + queries_at] = count
                notes[base + k_first_at] = k_first
                notes[base + keys_at] = k_count
            meet(barrier, threads)
        barrier_arrive(here + uint32(8 * slot))

    return note
