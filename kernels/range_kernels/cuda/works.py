"""The works of a kernel whose blocks outlive a tile: each a tile of queries of one head, and what a block notes of it.

    blocks as many as multiprocessors; the first work is the block's own number, the next comes from a counter that all share
    the warpgroup that copies notes a work while the tiles of the one before are under way; the others read

A note is `size_of(rows)` int32 in shared memory, in the order of the names below. There are `NOTES` of them, in turns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, int32, uint32, uint64

from .ptx import divide, load_int
from .ptx_hopper import barrier_arrive, barrier_wait, meet

NOTES = 4  # a power of two
HEAD, Q_FIRST, Q_COUNT, K_FIRST, K_COUNT = range(5)  # the head is -1 where there is no work left
BEGIN, END = 5, 6  # tiles of keys that some query sees: from the first up to the second
OWN = 8  # the same of each warpgroup's 64 queries, begin and end in turns
_BOUNDS = 14  # smallest low and largest reach of a warpgroup's queries, in turns
WHOLE = 20  # keys that all queries of a warp see, first and last in turns
LOWS = 44  # of every query; their reaches come after them
_NOWHERE = 1 << 30


def size_of(rows: int) -> int:
    """Numbers of a note of so many queries."""
    return LOWS + 2 * rows


@cache
def make_note(rows: int, tile: int, threads: int, barrier: int) -> Any:
    """The device function by which `threads` threads, who meet at a named barrier, note a work; `tile`: keys of a tile."""
    size, groups, nowhere = size_of(rows), rows // 64, _NOWHERE

    @cuda.jit(device=True, inline="always")
    def note(notes, here, read, number, work, works, heads, tiles, low, reach, thread):
        """`here`, `read`: addresses of the barriers of notes that are there and that have been read, 8 bytes each."""
        slot = int32(number & (NOTES - 1))
        base = int32(slot * size)
        if number >= NOTES:
            barrier_wait(read + uint32(8 * slot), uint32((number // NOTES - 1) & 1))
        if work >= works:
            if thread == 0:
                notes[base + HEAD] = int32(-1)
        else:
            row_of_heads = divide(work, heads)
            last_tile = divide(int32(works - 1), heads)
            # Late queries see most keys: they come first.
            entry = tiles + uint64(16) * uint64(int32(last_tile - row_of_heads))
            q_first, count = load_int(entry), load_int(entry + uint64(4))
            k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
            if thread < 2 * groups:
                notes[base + _BOUNDS + thread] = int32(-1) if thread & 1 else int32(nowhere)
            meet(barrier, threads)
            for part in range((rows + threads - 1) // threads):
                row = int32(part * threads + thread)
                if row < rows:  # all of a warp or none
                    first, last = int32(nowhere), int32(-1)
                    whole_from, whole_to = int32(-1), int32(nowhere)
                    if row < count:
                        place = uint64(4) * uint64(int32(q_first + row))
                        first = max(load_int(low + place), int32(0))
                        last = min(load_int(reach + place), int32(k_count - 1))
                        whole_from, whole_to = first, last
                        if first <= last:
                            cuda.atomic.min(notes, base + _BOUNDS + 2 * (row >> 6), first)
                            cuda.atomic.max(notes, base + _BOUNDS + 1 + 2 * (row >> 6), last)
                    notes[base + LOWS + row] = first
                    notes[base + LOWS + rows + row] = last
                    for flip in (8, 4, 2, 1):
                        whole_from = int32(max(whole_from, cuda.shfl_xor_sync(0xFFFFFFFF, whole_from, flip)))
                        whole_to = int32(min(whole_to, cuda.shfl_xor_sync(0xFFFFFFFF, whole_to, flip)))
                    if row & 15 == 0:
                        notes[base + WHOLE + 2 * (row >> 4)] = whole_from
                        notes[base + WHOLE + 2 * (row >> 4) + 1] = whole_to
            meet(barrier, threads)
            if thread == 0:
                notes[base + HEAD] = int32(work - row_of_heads * heads)
                notes[base + Q_FIRST] = q_first
                notes[base + Q_COUNT] = count
                notes[base + K_FIRST] = k_first
                notes[base + K_COUNT] = k_count
                least, most = int32(nowhere), int32(-1)
                for group in range(groups):
                    least = int32(min(least, notes[base + _BOUNDS + 2 * group]))
                    most = int32(max(most, notes[base + _BOUNDS + 2 * group + 1]))
                begin, end = int32(least // tile), int32((most + tile) // tile)
                notes[base + BEGIN] = begin
                notes[base + END] = max(begin, end)
                for group in range(groups):  # one that sees nothing begins and ends where the block does
                    own_begin = int32(min(notes[base + _BOUNDS + 2 * group] // tile, end))
                    own_end = int32((notes[base + _BOUNDS + 2 * group + 1] + tile) // tile)
                    notes[base + OWN + 2 * group] = own_begin
                    notes[base + OWN + 2 * group + 1] = max(own_begin, own_end)
        meet(barrier, threads)
        barrier_arrive(here + uint32(8 * slot))

    return note
