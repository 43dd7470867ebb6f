"""Attention of few queries over many pages, on tensor cores: what a decode step runs.

    an item: a stretch of one sequence's keys for one KV head     long contexts are split so that a small batch fills the GPU
    rows:    its queries times the heads of the group, up to 16   keys and values are read once for all of them
    block:   4 warps; of each tile of 64 keys a warp takes 16, with maxima and sums of its own
             -> the warps' sums are joined -> where the sequence is split, the block that comes last joins the items

Split keys: Flash-Decoding (Dao et al. 2023). The last block joins, so there is no second launch; it sets its counter back.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from .device import block_room, multiprocessors
from .fetch import THREADS, make_fetch, make_group_fetch, make_write
from .join import PARTS, begin_join, join_parts, make_join_of_warps, make_write_row, write_part
from .kernel import Kernel, Source
from .ptx import (
    add_at,
    copies_commit,
    copies_wait_all,
    copies_wait_but,
    divide,
    load_int,
    prefetch,
    shared_address,
    store_int,
    types,
)
from .tensor_core import DTYPES, aligned, softmax_factors
from .tile import KEYS, sums_row, tile_operations

ROWS = 16
_WARPS = THREADS // 32
# Tiles of keys and values in shared memory, of which one is used while the others are under way: for two blocks a multiprocessor,
# for one, and for GPUs with little shared memory.
_STAGES, _DEEP, _SHALLOW = 3, 5, 2


@cache
def make_kernel(head_dim: int, dtype: str, softcap: bool, stages: int):
    """The Python function of a kernel."""
    do = tile_operations(head_dim, 1, dtype, softcap, KEYS // _WARPS)
    begin_sums, score, hide, weigh, add_values, keep = do.start, do.scores, do.hide, do.weights, do.add_values, do.keep
    fetch = make_fetch(head_dim, KEYS, paged=True)
    fetch_queries, write_16_bytes = make_group_fetch(head_dim, ROWS), make_write(head_dim)
    pieces = head_dim // 8
    join_warps, write_row = make_join_of_warps(_WARPS), make_write_row(dtype)
    row_bytes, sum_bytes = 2 * head_dim + 16, sums_row(head_dim)
    q_room, kv_room = ROWS * row_bytes, KEYS * row_bytes
    stage = 2 * kv_room
    wait_for_tile = copies_wait_but[stages - 2]
    sums, score_count = head_dim // 2, KEYS // _WARPS // 2

    @cuda.jit(device=True, inline="always")
    def write(
        k_base, v_base, kv_token, new_keys, keys_token, new_values, values_token, first, stop, thread, pages, shift
    ):
        """New keys and values go to their pages: keys from `first` up to `stop` of a sequence."""
        for piece in range(thread, int32((stop - first) * pieces), THREADS):
            write_16_bytes(k_base, v_base, kv_token, new_keys, keys_token, new_values, values_token,
                           first, int32(piece), pages, shift)  # fmt: skip

    def decode(
        q,
        q_token,
        q_head,
        keys,
        values,
        kv_token,
        kv_head_stride,
        out,
        out_token,
        low,
        reach,
        items,
        table,
        table_stride,
        shift,
        partials,
        marks,
        counters,
        new_keys,
        new_keys_token,
        new_keys_head,
        new_values,
        new_values_token,
        new_values_head,
        group,
        factor,
        inner,
        outer,
    ):
        kv_head, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        kv_heads = int32(cuda.gridDim.x)
        room = cuda.shared.array(0, np.uint8)
        q_room_at = shared_address(room)
        entry = items + uint64(48 * cuda.blockIdx.y)
        q_first, queries = load_int(entry), load_int(entry + uint64(4))
        count = queries * group
        sequence, key_first = load_int(entry + uint64(8)), load_int(entry + uint64(12))
        key_stop, number_of_split = load_int(entry + uint64(16)), load_int(entry + uint64(20))
        splits, first_partial = load_int(entry + uint64(24)), load_int(entry + uint64(28))
        pages = table + uint64(sequence) * table_stride
        k_base, v_base = keys + uint64(kv_head) * kv_head_stride, values + uint64(kv_head) * kv_head_stride
        head = uint64(kv_head) * uint64(group)
        fetch_queries(q_room_at, q + uint64(q_first) * q_token + head * q_head, q_token, q_head, group, count, thread)
        copies_commit()
        if key_first + thread * 16 < key_stop:
            prefetch(pages + uint64(4 * ((key_first + thread * 16) >> shift)))
        fresh = key_stop  # keys from here on are still to be written to their pages: each by the one item that reads it
        if new_keys:
            fresh_from = load_int(entry + uint64(32)) - queries
            fresh = max(fresh_from, key_first)
            token, new_head = uint64(q_first + fresh - fresh_from), uint64(kv_head)
            new_keys += token * new_keys_token + new_head * new_keys_head
            new_values += token * new_values_token + new_head * new_values_head
        bounds = cuda.shared.array(4, int32)  # smallest low, largest reach, largest low, smallest reach
        lows, reaches = cuda.shared.array(ROWS, int32), cuda.shared.array(ROWS, int32)
        if thread == 0:
            bounds[0], bounds[1], bounds[2], bounds[3] = int32(1 << 30), int32(-1), int32(-1), int32(1 << 30)
        cuda.syncthreads()
        if thread < ROWS:
            lows[thread], reaches[thread] = int32(1 << 30), int32(-1)
            if thread < count:
                place = uint64(4 * (q_first + divide(thread, group)))
                first, last = max(load_int(low + place), key_first), min(load_int(reach + place), key_stop - 1)
                lows[thread], reaches[thread] = first, last
                cuda.atomic.max(bounds, 2, first)
                cuda.atomic.min(bounds, 3, last)
                if first <= last:
                    cuda.atomic.min(bounds, 0, first)
                    cuda.atomic.max(bounds, 1, last)
        cuda.syncthreads()
        begin, end = bounds[0] // KEYS, (bounds[1] + KEYS) // KEYS
        whole_from, whole_to = bounds[2], bounds[3]

        k_room_at, v_room_at = q_room_at + uint32(q_room), q_room_at + uint32(q_room + kv_room)
        q_address = q_room_at + uint32((lane & 15) * row_bytes + (lane >> 4) * 16)
        k_address = k_room_at + uint32((warp * 16 + (lane & 7) + (lane >> 4) * 8) * row_bytes + ((lane >> 3) & 1) * 16)
        v_address = v_room_at + uint32((warp * 16 + (lane & 15)) * row_bytes + (lane >> 4) * 16)
        lows_at, reaches_at = shared_address(lows), shared_address(reaches)

        o, four, running = cuda.local.array(sums, float32), cuda.local.array(4, float32), cuda.local.array(2, float32)
        s = cuda.local.array(score_count, float32)
        largest, total = cuda.local.array(2, float32), cuda.local.array(2, float32)
        begin_sums(o, largest, total)
        if begin < end:
            for ahead in range(stages - 1):
                if begin + ahead < end:
                    first = int32((begin + ahead) * KEYS)
                    there = uint32(ahead * stage)
                    if fresh < min(first + int32(KEYS), key_stop):
                        write(k_base, v_base, kv_token, new_keys, new_keys_token, new_values, new_values_token,
                              fresh, key_stop, thread, pages, shift)  # fmt: skip
                        fresh = key_stop
                        cuda.syncthreads()
                    fetch(k_room_at + there, k_base, kv_token, first, key_stop, thread, pages, shift)
                    fetch(v_room_at + there, v_base, kv_token, first, key_stop, thread, pages, shift)
                copies_commit()
        # Not among the first tiles: they need not wait for it. The loop's barrier comes before the next is fetched.
        write(k_base, v_base, kv_token, new_keys, new_keys_token, new_values, new_values_token,
              fresh, key_stop, thread, pages, shift)  # fmt: skip
        here = uint32(0)  # which of the rooms holds this tile
        for number in range(begin, end):
            key = int32(number * KEYS)
            wait_for_tile()
            cuda.syncthreads()  # this tile is here, and all have left the one before
            if number + stages - 1 < end:
                there = here + uint32((stages - 1) * stage)
                if there >= uint32(stages * stage):
                    there -= uint32(stages * stage)
                first = key + int32((stages - 1) * KEYS)
                fetch(k_room_at + there, k_base, kv_token, first, key_stop, thread, pages, shift)
                fetch(v_room_at + there, v_base, kv_token, first, key_stop, thread, pages, shift)
            copies_commit()
            score(s, q_address, k_address + here, inner, outer)
            if key < whole_from or key + KEYS - 1 > whole_to:
                hide(s, key + warp * 16 + int32(2 * (lane & 3)), lane >> 2, lows_at, reaches_at)
            weigh(s, o, largest, total, factor)
            add_values(o, s, v_address + here)
            here += uint32(stage)
            if here == uint32(stages * stage):
                here = uint32(0)

        copies_wait_all()
        cuda.syncthreads()  # all have left the tiles; the sums go where they lay
        warp_sums, warp_marks = uint32(ROWS * sum_bytes), uint32(ROWS * 8)
        marks_at = q_room_at + uint32(_WARPS) * warp_sums
        own = uint32(warp)
        keep(o, largest, total, q_room_at + own * warp_sums, marks_at + own * warp_marks, count, lane)
        cuda.syncthreads()
        slot = uint64(first_partial + number_of_split) * uint64(kv_heads) + uint64(kv_head)
        step = uint64(kv_heads * ROWS)  # from one split's marks to the next
        target = out + uint64(q_first) * out_token + uint64(kv_head * group * head_dim * 2)
        for quarter in range(thread, count * head_dim // 4, THREADS):
            row = 4 * quarter // head_dim
            channel = 4 * quarter - row * head_dim
            begin_join(four, running)
            sums_at = q_room_at + uint32(row * sum_bytes + 4 * channel)
            join_warps(four, running, sums_at, warp_sums, marks_at + uint32(8 * row), warp_marks, factor)
            if splits == 1:
                query = divide(row, group)
                place = target + uint64(query) * out_token
                write_row(four, running, place + uint64(2 * (4 * quarter - query * group * head_dim)))
            else:
                part = partials + uint64(4) * (slot * uint64(ROWS * head_dim) + uint64(4 * quarter))
                write_part(four, running, part, marks + uint64(8) * (slot * uint64(ROWS) + uint64(row)))
        if splits > 1:
            cuda.syncthreads()
            if thread == 0:
                counter = counters + uint64(4 * (sequence * kv_heads + kv_head))
                bounds[0] = add_at(counter, int32(1))
                if bounds[0] == splits - 1:
                    store_int(counter, int32(0))
            cuda.syncthreads()
            if bounds[0] == splits - 1:
                first_slot = uint64(first_partial) * uint64(kv_heads) + uint64(kv_head)
                for quarter in range(thread, count * head_dim // 4, THREADS):
                    row = 4 * quarter // head_dim
                    part = partials + uint64(4) * (first_slot * uint64(ROWS * head_dim) + uint64(4 * quarter))
                    mark = marks + uint64(8) * (first_slot * uint64(ROWS) + uint64(row))
                    begin_join(four, running)
                    for first in range(0, splits, PARTS):
                        far = uint64(first) * step
                        join_parts(
                            four, running, part + far * uint64(4 * head_dim), step * uint64(4 * head_dim),
                            mark + far * uint64(8), step * uint64(8), splits - first, factor,
                        )  # fmt: skip
                    query = divide(row, group)
                    channel = 4 * quarter - query * group * head_dim
                    write_row(four, running, target + uint64(query) * out_token + uint64(2 * channel))

    return decode


def _room(head_dim: int, stages: int) -> int:
    """Bytes of shared memory: queries and tiles, or afterwards the sums and marks of all warps."""
    row_bytes = 2 * head_dim + 16
    return max((ROWS + stages * 2 * KEYS) * row_bytes, _WARPS * ROWS * (sums_row(head_dim) + 8))


def signature() -> Any:
    """Types of a kernel's arguments."""
    address, stride = types.uint64, types.uint64
    bounds, scratch = (address, address), (address, address, address)
    new = (address, stride, stride, address, stride, stride)
    return types.void(
        address, stride, stride, address, address, stride, stride, address, stride,
        *bounds, address, address, stride, types.int32, *scratch, *new, types.int32, types.float32, types.float32, types.float32,
    )  # fmt: skip


@cache
def compiled(head_dim: int, dtype: str, softcap: bool, stages: int, device: int) -> Kernel:
    """The kernel on a device."""
    return Kernel(source(head_dim, dtype, softcap, stages), device)


def source(head_dim: int, dtype: str, softcap: bool, stages: int) -> Source:
    """What the kernel is made from."""
    make = partial(make_kernel, head_dim, dtype, softcap, stages)
    name = f"decode {head_dim} {dtype} softcap={softcap} stages={stages}"
    return Source(name, make, signature(), THREADS, blocks_of(head_dim, stages), _room(head_dim, stages))


def blocks_of(head_dim: int, stages: int) -> int:
    """Blocks that a multiprocessor holds."""
    return 2 if head_dim <= 128 and stages == _STAGES else 1


def choose_stages(head_dim: int, blocks: int, multiprocessors: int, room: int) -> int:
    """Stages for a launch of so many blocks on a GPU whose blocks may have `room` bytes of shared memory."""
    wanted = (_DEEP, _STAGES, _SHALLOW) if blocks <= multiprocessors else (_STAGES, _SHALLOW)
    return next((stages for stages in wanted if _room(head_dim, stages) <= room), _SHALLOW)


def launch(q, keys, values, out, low, reach, plan, new, scale, softcap) -> None:
    """Run the items of a `pages.DevicePlan`; `keys`, `values` `[places, kv_heads, head_dim]`, and so are `new`, to be written."""
    q = aligned(q)
    heads, head_dim = q.shape[1:]
    kv_heads = keys.shape[1]
    device = q.device.index or 0
    stages = choose_stages(head_dim, kv_heads * len(plan.items), multiprocessors(device), block_room(device))
    kernel = compiled(head_dim, DTYPES[q.dtype], softcap > 0, stages, device)
    factor, inner = softmax_factors(scale, softcap)
    size = q.element_size()
    rows = max(plan.partials, 1) * kv_heads * ROWS
    scratch = torch.empty(rows * (head_dim + 2), dtype=torch.float32, device=q.device)
    at, written = scratch.data_ptr(), [0] * 6
    if new is not None:
        new = [aligned(x) for x in new]  # kept until the launch
        written = [number for x in new for number in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)]
    kernel.launch(
        (kv_heads, len(plan.items)), q, q.data_ptr(), q.stride(0) * size, q.stride(1) * size, keys.data_ptr(), values.data_ptr(),
        keys.stride(0) * size, keys.stride(1) * size, out.data_ptr(), out.stride(0) * size,
        low.data_ptr(), reach.data_ptr(), plan.items.data_ptr(),
        plan.table.data_ptr(), 4 * plan.table.stride(0), plan.page_size.bit_length() - 1, at, at + 4 * rows * head_dim, plan.counters.data_ptr(),
        *written, heads // kv_heads, factor, inner, softcap,
    )  # fmt: skip
