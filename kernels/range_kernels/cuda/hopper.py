"""Prefill attention for Hopper (sm_90): wgmma, TMA, warp roles, blocks that outlive a tile.

    a block a multiprocessor takes work after work: a tile of queries of one head (`works`)
    warpgroup 0          brings queries and tiles of keys and values, two of each at once, and notes the next work; needs few
                         registers, gives the rest away
    the others           64 queries each; two, or three where the head is 64:
        for each tile:   start s = q k^T of this tile -> start o += weights V of the tile before -> s here? -> hide, weights
                         -> o here? -> shrink o
        a tile that none of its queries sees, a warpgroup lets pass

So the tensor cores work on one product while the softmax of another runs, twice: inside a warpgroup, and between them, who
hand the tensor cores on from one to the next. FlashAttention-3's plan (Shah et al. 2024, arXiv:2407.08608) with `low` and `reach` as its
mask. The copying unit (TMA, `boxes`) brings whole tiles, from pages or not. The end of a sequence is copied by threads, with
zeros behind: TMA would bring the next sequence's rows, or what lies in a page's free places, and zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from . import tensor_core
from .boxes import MAP, aim_map, copy_maps, make_bring, templates
from .device import multiprocessors
from .fetch import LINE, make_swizzled_fetch
from .kernel import Kernel, Source
from .ptx import divide, shared_address, take_number, types
from .ptx_hopper import (
    accept_map,
    barrier_arrive,
    barrier_arrive_after_copies,
    barrier_init,
    barrier_wait,
    barriers_ready,
    fence_for_wgmma,
    maps_written,
    meet,
    registers,
    signal,
    uniform,
)
from .rooms import arrive_at, barrier_of, room_of, wait_for
from .tile import tile_operations
from .warpgroup import groups_of, keys_of, rows_of, warpgroup_operations
from .works import BEGIN, END, HEAD, K_COUNT, K_FIRST, LOWS, NOTES, OWN, Q_COUNT, Q_FIRST, WHOLE, make_note, size_of

GROUP = 128  # threads of a warpgroup
HEAD_DIMS = (64, 128, 256)
_COPYING = 8  # the named barrier of the warpgroup that copies

# What the copying warpgroup keeps of registers a thread and what the others take, by how many others there are.
_REGISTERS = {2: (40, 232), 3: (32, 160)}


def can_run(q: torch.Tensor, scale: float) -> bool:
    """Whether this path computes such a call."""
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and q.shape[-1] in HEAD_DIMS and tensor_core.can_run(q, scale)


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
    fetch = make_swizzled_fetch(head_dim, keys, paged)
    bring, bring_queries = make_bring(head_dim, keys, paged), make_bring(head_dim, rows, False)
    tile_room = keys * head_dim * 2
    k_room, v_room = rows * head_dim * 2, rows * head_dim * 2 + 2 * tile_room
    s_count, o_count, p_count = keys // 2, head_dim // 2, keys // 4
    note_work, note_size = make_note(rows, keys, GROUP, _COPYING), size_of(rows)
    notes_size, barrier_count = NOTES * note_size, 9 + 2 * NOTES

    @cuda.jit(device=True, inline="always")
    def bring_tile(target, map, base, stride, head, number, k_first, k_count, here, thread, pages, shift):
        """A tile of keys or values: by the copying unit where all of it belongs to the sequence, else by threads, zeros behind."""
        first = int32(number * keys)
        if first + keys <= k_count:
            fence_for_wgmma()  # threads may have written there last
            bring(target, map, head, first if paged else int32(k_first + first), here, thread, pages, shift)
        else:
            fetch(target, base, stride, first, k_count, thread, pages, shift)
            barrier_arrive_after_copies(here)

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
        heads,
        works,
        counter,
        q_rows,
        kv_rows,
        map_templates,
        maps,
    ):
        thread = int32(cuda.threadIdx.x)
        lane = thread & 31
        notes, next_work = cuda.shared.array(notes_size, int32), cuda.shared.array(1, int32)
        # Arrivals: queries here; keys here, values here, keys read, values read, of two tiles each; notes here, notes read.
        barriers = cuda.shared.array(barrier_count, uint64)
        room = cuda.shared.array(0, np.uint8)
        queries_here = shared_address(barriers)
        keys_here, values_here = queries_here + uint32(8), queries_here + uint32(24)
        keys_read, values_read = queries_here + uint32(40), queries_here + uint32(56)
        notes_here, notes_read = queries_here + uint32(72), queries_here + uint32(72 + 8 * NOTES)
        if thread == 0:
            for number in range(5):
                barrier_init(queries_here + uint32(8 * number), uint32(GROUP))
            for number in range(5, 9):
                barrier_init(queries_here + uint32(8 * number), uint32(4 * groups))  # one lane of each warp that reads
            for number in range(NOTES):
                barrier_init(notes_here + uint32(8 * number), uint32(GROUP))
                barrier_init(notes_read + uint32(8 * number), uint32(4 * groups))
            barriers_ready()
        maps += uint64(3 * MAP) * uint64(cuda.blockIdx.x)
        copy_maps(maps, map_templates, 3, thread)
        cuda.syncthreads()
        q_room_at = (shared_address(room) + uint32(1023)) & uint32(0xFFFFFC00)  # swizzled rows repeat every 1024 bytes
        k_room_at, v_room_at = q_room_at + uint32(k_room), q_room_at + uint32(v_room)
        role = uniform(thread >> 7)
        # Tiles of keys in all works so far: their number is the next tile's turn.
        count_of_tiles = int32(0)
        this_work = int32(0)

        if role == 0:
            leave_registers()
            k_map, v_map = maps + uint64(MAP), maps + uint64(2 * MAP)
            if thread < 32:
                if thread == 0:
                    aim_map(maps, q, q_rows)
                    aim_map(k_map, k, kv_rows)
                    aim_map(v_map, v, kv_rows)
                    maps_written()
                cuda.syncwarp()
                accept_map(maps)
                accept_map(k_map)
                accept_map(v_map)
            following = int32(cuda.blockIdx.x)
            note_work(notes, notes_here, notes_read, int32(0), following, works, heads, tiles, low, reach, thread)
            following = works
            if thread == 0 and counter:
                following = int32(cuda.gridDim.x) + take_number(counter, int32(1))
            while True:
                note = int32((this_work & (NOTES - 1)) * note_size)
                head = notes[note + HEAD]
                if head < 0:
                    break
                k_first, k_count = notes[note + K_FIRST], notes[note + K_COUNT]
                begin, end = notes[note + BEGIN], notes[note + END]
                kv_head = divide(head, group)
                k_base, v_base = k + uint64(kv_head) * k_head, v + uint64(kv_head) * v_head
                pages = table + uint64(k_first) * table_stride
                if not paged:
                    k_base += uint64(k_first) * k_token
                    v_base += uint64(k_first) * v_token
                if begin < end:
                    first = count_of_tiles
                    if first >= 2:
                        wait_for(keys_read, int32(first - 2))
                    bring_tile(k_room_at + room_of(first) * uint32(tile_room), k_map, k_base, k_token, kv_head, begin, k_first, k_count,
                               barrier_of(keys_here, first), thread, pages, shift)  # fmt: skip
                    if first >= 1:  # whoever has read the last keys of the work before needs its queries no more
                        wait_for(keys_read, int32(first - 1))
                    bring_queries(q_room_at, maps, head, notes[note + Q_FIRST], queries_here, thread, pages, shift)
                # Once, too, where there is no tile: the next work is noted here.
                for number in range(begin, max(end, begin + 1)):
                    turn = int32(count_of_tiles + number - begin)
                    if number + 1 < end:  # the next tile's keys are wanted before this one's values
                        after = int32(turn + 1)
                        if after >= 2:
                            wait_for(keys_read, int32(after - 2))
                        bring_tile(k_room_at + room_of(after) * uint32(tile_room), k_map, k_base, k_token, kv_head, number + 1, k_first,
                                   k_count, barrier_of(keys_here, after), thread, pages, shift)  # fmt: skip
                    if number < end:
                        if turn >= 2:
                            wait_for(values_read, int32(turn - 2))
                        bring_tile(v_room_at + room_of(turn) * uint32(tile_room), v_map, v_base, v_token, kv_head, number, k_first, k_count,
                                   barrier_of(values_here, turn), thread, pages, shift)  # fmt: skip
                    if number == begin:  # the first tiles are under way: time to note the next work
                        if thread == 0:
                            next_work[0] = following
                        meet(_COPYING, GROUP)
                        work = next_work[0]
                        after = int32(this_work + 1)
                        note_work(notes, notes_here, notes_read, after, work, works, heads, tiles, low, reach, thread)
                        if thread == 0 and work < works:
                            following = int32(cuda.gridDim.x) + take_number(counter, int32(1))
                count_of_tiles = int32(count_of_tiles + end - begin)
                this_work = int32(this_work + 1)
        else:
            take_registers()
            warp = int32((thread >> 5) - 4)
            row = int32(warp * 16 + (lane >> 2))
            notes_at = shared_address(notes)
            q_at = q_room_at + uint32((role - 1) * 64 * LINE)
            turn_of, turn_of_next = int32(role), int32(role % groups + 1)  # named barriers from 1 on: whose turn it is
            o, s = cuda.local.array(o_count, float32), cuda.local.array(s_count, float32)
            p = cuda.local.array(p_count, int32)
            largest, total = cuda.local.array(2, float32), cuda.local.array(2, float32)
            shrinks = cuda.local.array(2, float32)
            column = int32(2 * (lane & 3))
            count_of_queries = int32(0)  # that came; a work without keys has none
            if role == groups:
                signal(turn_of_next, 2 * GROUP)
            while True:
                slot = int32(this_work & (NOTES - 1))
                note = int32(slot * note_size)
                barrier_wait(notes_here + uint32(8 * slot), uint32((this_work // NOTES) & 1))
                # What is told to be the same in all lanes, and what follows from it, the compiler keeps in uniform registers.
                head = uniform(notes[note + HEAD])
                if head < 0:
                    break
                q_first, count = notes[note + Q_FIRST], notes[note + Q_COUNT]
                begin, end = uniform(notes[note + BEGIN]), uniform(notes[note + END])
                own = int32(note + OWN + 2 * (role - 1))  # this warpgroup sees these tiles, perhaps none
                own_begin, own_end = uniform(notes[own]), uniform(notes[own + 1])
                whole = int32(note + WHOLE + 2 * warp)
                whole_from, whole_to = notes[whole], notes[whole + 1]
                lows_at, reaches_at = notes_at + uint32(4 * (note + LOWS)), notes_at + uint32(4 * (note + LOWS + rows))
                begin_sums(o, largest, total)
                if begin < end:
                    barrier_wait(queries_here, uint32(count_of_queries & 1))
                    count_of_queries = int32(count_of_queries + 1)
                    first = int32(count_of_tiles - begin)  # and a tile's number make its turn
                    for number in range(begin, own_begin):
                        pass_by(int32(first + number), keys_here, keys_read, values_here, values_read, turn_of, turn_of_next, lane)  # fmt: skip
                    if own_begin < own_end:
                        turn = int32(first + own_begin)
                        wait_for(keys_here, turn)
                        fence_for_wgmma()
                        meet(turn_of, 2 * GROUP)
                        start_scores(s, q_at, k_room_at + room_of(turn) * uint32(tile_room))
                        signal(turn_of_next, 2 * GROUP)
                        wait_all_scores(s, inner, outer)
                        arrive_at(keys_read, turn, lane)
                        key = int32(own_begin * keys)
                        if key < whole_from or key + keys - 1 > whole_to:
                            hide(s, key + column, row, lows_at, reaches_at)
                        weigh(s, shrinks, largest, total, factor)
                        pack(p, s)
                        for number in range(own_begin + 1, own_end):
                            turn = int32(first + number)
                            before = int32(turn - 1)
                            wait_for(keys_here, turn)
                            fence_for_wgmma()
                            meet(turn_of, 2 * GROUP)
                            start_scores(s, q_at, k_room_at + room_of(turn) * uint32(tile_room))
                            wait_for(values_here, before)
                            fence_for_wgmma()
                            start_values(o, p, v_room_at + room_of(before) * uint32(tile_room))
                            signal(turn_of_next, 2 * GROUP)
                            wait_scores(s, inner, outer)
                            arrive_at(keys_read, turn, lane)
                            key = int32(number * keys)
                            if key < whole_from or key + keys - 1 > whole_to:
                                hide(s, key + column, row, lows_at, reaches_at)
                            weigh(s, shrinks, largest, total, factor)
                            wait_values(o, p)
                            arrive_at(values_read, before, lane)
                            shrink(o, shrinks)
                            pack(p, s)
                        turn = int32(first + own_end - 1)
                        wait_for(values_here, turn)
                        fence_for_wgmma()
                        start_values(o, p, v_room_at + room_of(turn) * uint32(tile_room))
                        wait_values(o, p)
                        arrive_at(values_read, turn, lane)
                    for number in range(own_end, end):
                        pass_by(int32(first + number), keys_here, keys_read, values_here, values_read, turn_of, turn_of_next, lane)  # fmt: skip
                    count_of_tiles = int32(count_of_tiles + end - begin)
                target = out + uint64(q_first) * out_token + uint64(head * head_dim * 2)
                store(o, total, target, out_token, row, count, lane)
                cuda.syncwarp()  # all lanes have read the note
                if lane == 0:
                    barrier_arrive(notes_read + uint32(8 * slot))
                this_work = int32(this_work + 1)
            if role == 1:
                meet(turn_of, 2 * GROUP)  # the last signal of the last warpgroup

    return prefill


@cuda.jit(device=True, inline="always")
def pass_by(turn, keys_here, keys_read, values_here, values_read, turn_of, turn_of_next, lane):
    """A warpgroup whose rows see nothing of a tile lets it pass: others count on its arrivals."""
    wait_for(keys_here, turn)
    cuda.syncwarp()  # a lane that still asks for this turn would not hear of it after the next
    arrive_at(keys_read, turn, lane)
    meet(turn_of, 2 * GROUP)
    signal(turn_of_next, 2 * GROUP)
    wait_for(values_here, turn)
    cuda.syncwarp()
    arrive_at(values_read, turn, lane)


@dataclass(frozen=True)
class Lasting(tensor_core.Compiled):
    """A kernel whose blocks outlive a tile, one a multiprocessor; `keys` of a tile."""

    keys: int

    def launch(
        self, qkv: Sequence[torch.Tensor], tiles: torch.Tensor, page_size: int | None, arguments: Sequence[float]
    ) -> None:
        q, k, _ = qkv
        works = q.shape[1] * len(tiles)
        blocks = min(works, multiprocessors(q.device.index or 0))
        # Set to zero for each launch: one that is shared would count for two launches at once on two streams.
        counter = torch.zeros(1, dtype=torch.int32, device=q.device) if works > blocks else None
        at = 0 if counter is None else counter.data_ptr()
        box = min(self.keys, page_size or self.keys)
        made = templates(qkv, (self.rows, box, box))
        maps = torch.empty(blocks, 3 * MAP, dtype=torch.uint8, device=q.device)
        pointers = (made.data_ptr(), maps.data_ptr())
        self.kernel.launch((blocks, 1), q, *arguments, q.shape[1], works, at, len(q), len(k), *pointers)


@cache
def compiled(head_dim: int, dtype: str, softcap: bool, paged: bool, device: int) -> tensor_core.Compiled:
    """The kernel on a device."""
    kernel = Kernel(source(head_dim, dtype, softcap, paged), device)
    return Lasting(kernel, rows_of(head_dim), keys_of(head_dim))


def source(head_dim: int, dtype: str, softcap: bool, paged: bool) -> Source:
    """What the kernel is made from; arguments as `tensor_core` has them, strides of queries unused, and those of `Lasting.launch`."""
    # Queries, two tiles of keys and of values, from an address on that 1,024 divides.
    room = 2 * head_dim * (rows_of(head_dim) + 4 * keys_of(head_dim)) + 1024
    name = f"hopper prefill {head_dim} {dtype} softcap={softcap} paged={paged}"
    make = partial(make_kernel, head_dim, dtype, softcap, paged)
    signature = types.void(
        *tensor_core.arguments(),
        *(types.int32, types.int32, types.uint64),
        *(types.int32, types.int32, types.uint64, types.uint64),
    )
    return Source(name, make, signature, (1 + groups_of(head_dim)) * GROUP, 1, room)
