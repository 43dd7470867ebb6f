"""The tile scheduler of a persistent kernel: work tiles, each a tile of queries of one head, and their records in shared memory.

    one block per multiprocessor; its first work tile is the block's number, the next ones come from a counter that all blocks share
    the producer warpgroup writes a work tile's record while the key tiles of the previous one are in flight; the
    consumers read it and release its slot

A record is `record_size(rows)` int32 in shared memory, in the order of the names below. `SLOTS` records form a ring.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, int32, uint32, uint64

from .ptx import divide, load_int
from .ptx_sm90 import barrier_arrive, barrier_wait, named_barrier_sync

SLOTS = 4  # a power of two
# Query head, or -1 if no work tile is left; first query and number of queries; first key (if paged, the row of the
# block table) and number of keys of the sequence.
HEAD, Q_FIRST, Q_COUNT, K_FIRST, K_COUNT = range(5)
BEGIN, END = 5, 6  # half-open range of key tiles that some query sees
OWN = 8  # the same for each warpgroup's 64 queries: (begin, end) pairs
_BOUNDS = 14  # (smallest key_start, largest key_stop) of each warpgroup's queries
WHOLE = 20  # (first, stop) of the keys that all 16 queries of a warp see
KEY_STARTS = 44  # of all queries, followed by their key_stops
_NO_KEY = 1 << 30


def record_size(rows: int) -> int:
    """Number of int32 in the record of a work tile of `rows` queries."""
    return KEY_STARTS + 2 * rows


@cache
def make_write_work_tile(rows: int, tile: int, threads: int, barrier: int) -> Any:
    """Return the device function `write_work_tile`, which `threads` threads call together.

    Args:
        rows: queries per work tile, a multiple of 64.
        tile: keys per key tile.
        threads: number of threads that call it.
        barrier: number of the named barrier that synchronises them.
    """
    size, warpgroups, no_key = record_size(rows), rows // 64, _NO_KEY

    @cuda.jit(device=True, inline="always")
    def write_work_tile(work_tiles, full, empty, number, work, total_work, heads, tiles, key_start, key_stop, thread):
        """Write the record of work tile `work` into its slot, `number % SLOTS`; all `threads` threads call it.

        First waits until the consumers have released the slot's previous record, and at the end every thread arrives at
        the slot's full mbarrier. If `work >= total_work`, no work tile is left: only HEAD is written, as -1.

        work_tiles: the ring of records, int32 in shared memory.
        full, empty: shared-memory addresses of the first full and the first empty mbarrier; one of 8 bytes per slot.
        number: how many records this block has written before.
        work: index of the work tile; consecutive ones are the heads of one tile of queries, late tiles first.
        heads: number of query heads.
        tiles: global address of the tile plan; see `tile_plan.plan_tiles`.
        key_start, key_stop: global addresses of int32 `[queries]`.
        thread: index of the calling thread, from 0.
        """
        slot = int32(number & (SLOTS - 1))
        base = int32(slot * size)
        if number >= SLOTS:
            barrier_wait(empty + uint32(8 * slot), uint32((number // SLOTS - 1) & 1))
        if work >= total_work:
            if thread == 0:
                work_tiles[base + HEAD] = int32(-1)
        else:
            tile_row = divide(work, heads)
            last_tile = divide(int32(total_work - 1), heads)
            # Late queries see the most keys, so their tiles come first.
            entry = tiles + uint64(16) * uint64(int32(last_tile - tile_row))
            q_first, count = load_int(entry), load_int(entry + uint64(4))
            k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
            if thread < 2 * warpgroups:
                work_tiles[base + _BOUNDS + thread] = int32(0) if thread & 1 else int32(no_key)
            named_barrier_sync(barrier, threads)
            for part in range((rows + threads - 1) // threads):
                row = int32(part * threads + thread)
                if row < rows:  # true for all lanes of a warp or for none
                    first, stop = int32(no_key), int32(0)
                    whole_from, whole_to = int32(-1), int32(no_key)
                    if row < count:
                        offset = uint64(4) * uint64(int32(q_first + row))
                        first = max(load_int(key_start + offset), int32(0))
                        stop = min(load_int(key_stop + offset), k_count)
                        whole_from, whole_to = first, stop
                        if first < stop:
                            cuda.atomic.min(work_tiles, base + _BOUNDS + 2 * (row >> 6), first)
                            cuda.atomic.max(work_tiles, base + _BOUNDS + 1 + 2 * (row >> 6), stop)
                    work_tiles[base + KEY_STARTS + row] = first
                    work_tiles[base + KEY_STARTS + rows + row] = stop
                    for flip in (8, 4, 2, 1):
                        whole_from = int32(max(whole_from, cuda.shfl_xor_sync(0xFFFFFFFF, whole_from, flip)))
                        whole_to = int32(min(whole_to, cuda.shfl_xor_sync(0xFFFFFFFF, whole_to, flip)))
                    if row & 15 == 0:
                        work_tiles[base + WHOLE + 2 * (row >> 4)] = whole_from
                        work_tiles[base + WHOLE + 2 * (row >> 4) + 1] = whole_to
            named_barrier_sync(barrier, threads)
            if thread == 0:
                work_tiles[base + HEAD] = int32(work - tile_row * heads)
                work_tiles[base + Q_FIRST] = q_first
                work_tiles[base + Q_COUNT] = count
                work_tiles[base + K_FIRST] = k_first
                work_tiles[base + K_COUNT] = k_count
                smallest, largest = int32(no_key), int32(0)
                for group in range(warpgroups):
                    smallest = int32(min(smallest, work_tiles[base + _BOUNDS + 2 * group]))
                    largest = int32(max(largest, work_tiles[base + _BOUNDS + 2 * group + 1]))
                begin, end = int32(smallest // tile), int32((largest + tile - 1) // tile)
                work_tiles[base + BEGIN] = begin
                work_tiles[base + END] = max(begin, end)
                for group in range(warpgroups):  # one that sees nothing gets an empty range at the block's end
                    own_begin = int32(min(work_tiles[base + _BOUNDS + 2 * group] // tile, end))
                    own_end = int32((work_tiles[base + _BOUNDS + 2 * group + 1] + tile - 1) // tile)
                    work_tiles[base + OWN + 2 * group] = own_begin
                    work_tiles[base + OWN + 2 * group + 1] = max(own_begin, own_end)
        named_barrier_sync(barrier, threads)
        barrier_arrive(full + uint32(8 * slot))

    return write_work_tile
