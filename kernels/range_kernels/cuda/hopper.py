"""Prefill attention for Hopper (sm_90): wgmma, warp roles, warpgroups that take turns.

    warpgroup 0          brings tiles of keys and values into shared memory, two of each; needs few registers, gives the rest away
    the others           64 queries each; two, or three where the head is 64:
        for each tile:   start s = q k^T of this tile -> start o += weights V of the tile before -> s here? -> hide, weights
                         -> o here? -> shrink o

So the tensor cores work on one product while the softmax of another runs, twice: inside a warpgroup, and between them, who
hand the tensor cores on from one to the next. FlashAttention-3's plan (Shah et al. 2024, arXiv:2407.08608) with `low` and `reach` as its
mask. Rows are copied by cp.async and not by TMA: it reads pages and gaps between rows as they are, and writes zeros after the
end of a sequence, where TMA would bring the next one's rows, NaN included.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from . import tensor_core
from .kernel import Kernel, Source
from .ptx import copy_async, load_int, shared_address
from .ptx_hopper import (
    barrier_arrive,
    barrier_arrive_after_copies,
    barrier_init,
    barrier_wait,
    barriers_ready,
    fence_for_wgmma,
    meet,
    registers,
    signal,
    uniform,
)
from .tile import tile_operations
from .warpgroup import LINE, groups_of, keys_of, rows_of, warpgroup_operations

GROUP = 128  # threads of a warpgroup
HEAD_DIMS = (64, 128, 256)

# What the copying warpgroup keeps of registers a thread and what the others take, by how many others there are.
_REGISTERS = {2: (40, 232), 3: (32, 160)}


def can_run(q: torch.Tensor, scale: float) -> bool:
    """Whether this path computes such a call."""
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and q.shape[-1] in HEAD_DIMS and tensor_core.can_run(q, scale)


def make_fetch(head_dim: int, rows: int, paged: bool = False):
    """The device function with which a warpgroup starts the copies of `rows` rows of one head, 16 bytes a thread at a time.

    Where paged, rows are places in a sequence whose pages, of `1 << shift` rows, have their numbers at the address `pages`.
    """
    blocks = head_dim // 64

    @cuda.jit(device=True, inline="always")
    def fetch(target, source, stride, first, limit, thread, pages, shift):
        """Rows from row `first` on; rows from `limit` on are zeros."""
        line, piece = thread >> 3, thread & 7
        place = target + uint32(line * LINE + ((piece ^ (line & 7)) << 4))
        for step in range(rows // 16):
            row = first + step * 16 + line
            inside = row < limit
            token = row if inside else first
            if paged:
                token += (load_int(pages + uint64(4 * (token >> shift))) - (token >> shift)) << shift
            here = source + uint64(token) * stride + uint64(piece * 16)
            size = uint32(16) if inside else uint32(0)
            for block in range(blocks):
                copy_async(place + uint32(block * rows * LINE + step * 16 * LINE), here + uint64(block * LINE), size)

    return fetch


@cache
def make_kernel(head_dim: int, dtype: str, softcap: bool, paged: bool):
    """The Python function of a kernel."""
    keys, rows, groups = keys_of(head_dim), rows_of(head_dim), groups_of(head_dim)
    leave_registers, take_registers = (
        registers(change, count) for change, count in zip(("dec", "inc"), _REGISTERS[groups], strict=True)
    )
    do = warpgroup_operations(head_dim, dtype, softcap)
    start_scores, wait_all_scores, wait_scores = do.start_scores, do.wait_all_scores, do.wait_scores
    weigh, start_values, wait_values, shrink, pack = (
        do.weights,
        do.start_values,
        do.wait_values,
        do.shrink,
        do.pack,
    )
    warp = tile_operations(head_dim, 1, dtype, softcap, keys)
    begin_sums, hide, store = warp.start, warp.hide, warp.store
    fetch_queries, fetch = make_fetch(head_dim, rows), make_fetch(head_dim, keys, paged)
    tile_room = keys * head_dim * 2
    k_room, v_room = rows * head_dim * 2, rows * head_dim * 2 + 2 * tile_room
    s_count, o_count, p_count = keys // 2, head_dim // 2, keys // 4

    def prefill(
        q,
        q_token,
        q_head,
        k,
        k_token,
        k_head,
        v,
        v_token,
        v_head,
        out,
        out_token,
        low,
        reach,
        tiles,
        table,
        table_stride,
        shift,
        group,
        factor,
        inner,
        outer,
    ):
        head = cuda.blockIdx.x
        tile = cuda.gridDim.y - 1 - cuda.blockIdx.y  # late queries see most keys: they start first
        thread = int32(cuda.threadIdx.x)
        lane = thread & 31
        entry = tiles + uint64(16 * tile)
        q_first, count = load_int(entry), load_int(entry + uint64(4))
        k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
        bounds = cuda.shared.array(2, int32)  # smallest low, largest reach
        lows, reaches = cuda.shared.array(rows, int32), cuda.shared.array(rows, int32)
        # Arrivals: queries here; keys here, values here, keys read, values read, of two tiles each.
        barriers = cuda.shared.array(9, uint64)
        room = cuda.shared.array(0, np.uint8)
        queries_here = shared_address(barriers)
        keys_here, values_here = queries_here + uint32(8), queries_here + uint32(24)
        keys_read, values_read = queries_here + uint32(40), queries_here + uint32(56)
        if thread == 0:
            bounds[0], bounds[1] = int32(1 << 30), int32(-1)
            for number in range(5):
                barrier_init(queries_here + uint32(8 * number), uint32(GROUP))
            for number in range(5, 9):
                barrier_init(queries_here + uint32(8 * number), uint32(4 * groups))  # one lane of each warp that reads
            barriers_ready()
        cuda.syncthreads()
        if thread < rows:
            lows[thread], reaches[thread] = int32(1 << 30), int32(-1)
            if thread < count:
                place = uint64(4 * (q_first + thread))
                first, last = max(load_int(low + place), 0), min(load_int(reach + place), k_count - 1)
                lows[thread], reaches[thread] = first, last
                if first <= last:
                    cuda.atomic.min(bounds, 0, first)
                    cuda.atomic.max(bounds, 1, last)
        cuda.syncthreads()
        begin, end = bounds[0] // keys, (bounds[1] + keys) // keys
        q_room_at = (shared_address(room) + uint32(1023)) & uint32(0xFFFFFC00)  # swizzled rows repeat every 1024 bytes
        k_room_at, v_room_at = q_room_at + uint32(k_room), q_room_at + uint32(v_room)
        role = uniform(thread >> 7)

        if role == 0:
            leave_registers()
            kv_head = uint64(head // group)
            k_base, v_base = k + kv_head * k_head, v + kv_head * v_head
            pages = table + uint64(k_first) * table_stride
            if not paged:
                k_base += uint64(k_first) * k_token
                v_base += uint64(k_first) * v_token
            if begin < end:
                q_base = q + uint64(q_first) * q_token + uint64(head) * q_head
                fetch_queries(q_room_at, q_base, q_token, int32(0), count, thread, pages, shift)
                barrier_arrive_after_copies(queries_here)
                fetch(k_room_at, k_base, k_token, int32(begin * keys), k_count, thread, pages, shift)
                barrier_arrive_after_copies(keys_here)
            for number in range(begin, end):
                turn = int32(number - begin)
                if number + 1 < end:  # the next tile's keys are wanted before this one's values
                    there = uint32((turn + 1) & 1)
                    if turn >= 1:
                        barrier_wait(keys_read + there * uint32(8), uint32((((turn + 1) >> 1) - 1) & 1))
                    first = int32((number + 1) * keys)
                    fetch(k_room_at + there * uint32(tile_room), k_base, k_token, first, k_count, thread, pages, shift)
                    barrier_arrive_after_copies(keys_here + there * uint32(8))
                here = uint32(turn & 1)
                if turn >= 2:
                    barrier_wait(values_read + here * uint32(8), uint32(((turn >> 1) - 1) & 1))
                first = int32(number * keys)
                fetch(v_room_at + here * uint32(tile_room), v_base, v_token, first, k_count, thread, pages, shift)
                barrier_arrive_after_copies(values_here + here * uint32(8))
        else:
            take_registers()
            first_row = int32((role - 1) * 64 + ((thread >> 5) & 3) * 16)  # of the warp
            row = first_row + (lane >> 2)
            lows_at, reaches_at = shared_address(lows), shared_address(reaches)
            whole_from, whole_to = int32(-1), int32(1 << 30)  # keys that all rows of the warp see
            for number in range(first_row, min(first_row + 16, count)):
                whole_from, whole_to = max(whole_from, lows[number]), min(whole_to, reaches[number])
            q_at = q_room_at + uint32((role - 1) * 64 * LINE)
            turn_of, turn_of_next = int32(role), int32(role % groups + 1)  # named barriers from 1 on: whose turn it is
            o, s = cuda.local.array(o_count, float32), cuda.local.array(s_count, float32)
            p = cuda.local.array(p_count, int32)
            largest, total = cuda.local.array(2, float32), cuda.local.array(2, float32)
            shrinks = cuda.local.array(2, float32)
            begin_sums(o, largest, total)
            column = int32(2 * (lane & 3))
            if begin < end:
                if role == groups:
                    signal(turn_of_next, 2 * GROUP)
                barrier_wait(queries_here, uint32(0))
                barrier_wait(keys_here, uint32(0))
                fence_for_wgmma()
                start_scores(s, q_at, k_room_at)
                wait_all_scores(s, inner, outer)
                if lane == 0:
                    barrier_arrive(keys_read)
                key = int32(begin * keys)
                if key < whole_from or key + keys - 1 > whole_to:
                    hide(s, key + column, row, lows_at, reaches_at)
                weigh(s, shrinks, largest, total, factor)
                pack(p, s)
                for number in range(begin + 1, end):
                    turn = int32(number - begin)
                    here, before = uint32(turn & 1), uint32((turn - 1) & 1)
                    barrier_wait(keys_here + here * uint32(8), uint32((turn >> 1) & 1))
                    fence_for_wgmma()
                    meet(turn_of, 2 * GROUP)
                    start_scores(s, q_at, k_room_at + here * uint32(tile_room))
                    barrier_wait(values_here + before * uint32(8), uint32(((turn - 1) >> 1) & 1))
                    fence_for_wgmma()
                    start_values(o, p, v_room_at + before * uint32(tile_room))
                    if role < groups or number + 1 < end:
                        signal(turn_of_next, 2 * GROUP)
                    wait_scores(s, inner, outer)
                    if lane == 0:
                        barrier_arrive(keys_read + here * uint32(8))
                    key = int32(number * keys)
                    if key < whole_from or key + keys - 1 > whole_to:
                        hide(s, key + column, row, lows_at, reaches_at)
                    weigh(s, shrinks, largest, total, factor)
                    wait_values(o, p)
                    if lane == 0:
                        barrier_arrive(values_read + before * uint32(8))
                    shrink(o, shrinks)
                    pack(p, s)
                last = int32(end - 1 - begin)
                here = uint32(last & 1)
                barrier_wait(values_here + here * uint32(8), uint32((last >> 1) & 1))
                fence_for_wgmma()
                start_values(o, p, v_room_at + here * uint32(tile_room))
                wait_values(o, p)
            target = out + uint64(q_first) * out_token + uint64(head * head_dim * 2) + uint64(4 * (lane & 3))
            store(o, total, target, out_token, row, count)

    return prefill


@cache
def compiled(head_dim: int, dtype: str, softcap: bool, paged: bool, device: int) -> tensor_core.Compiled:
    """The kernel on a device."""
    return tensor_core.Compiled(Kernel(source(head_dim, dtype, softcap, paged), device), rows_of(head_dim))


def source(head_dim: int, dtype: str, softcap: bool, paged: bool) -> Source:
    """What the kernel is made from; arguments as `tensor_core.signature` has them."""
    # Queries, two tiles of keys and of values, from an address on that 1,024 divides.
    room = 2 * head_dim * (rows_of(head_dim) + 4 * keys_of(head_dim)) + 1024
    name = f"hopper prefill {head_dim} {dtype} softcap={softcap} paged={paged}"
    make = partial(make_kernel, head_dim, dtype, softcap, paged)
    return Source(name, make, tensor_core.signature(), (1 + groups_of(head_dim)) * GROUP, 1, room)
