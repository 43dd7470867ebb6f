"""Prefill attention for Hopper (sm_90; the path "hopper"): a persistent, warp-specialised kernel with wgmma and TMA.

    one block per multiprocessor processes `total_work` work tiles: a tile of queries of one head each
    warpgroup 0          the producer: loads queries and tiles of keys and values, two stages of each, and writes the next work
                         tile's record; needs few registers and releases the rest
    the others           consumers of 64 queries each; two, or three if the head size is 64:
        for each tile:   start s = q k^T of this tile -> start o += p v of the previous tile -> wait for s -> apply_mask, softmax
                         step -> wait for o -> rescale o
        a warpgroup skips tiles that none of its queries sees

So the tensor cores compute one product during the softmax of another, within a warpgroup and between warpgroups, which use the
tensor cores alternately (ping-pong). This is FlashAttention-3's design (Shah et al. 2024, arXiv:2407.08608) with `key_start` and
`key_stop` as its mask. TMA (`tma`) loads whole tiles, paged or not. Threads copy the partial tile at the end of a sequence and pad
it with zeros: TMA would load the next sequence's rows or a page's unused rows, and zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from . import prefill_sm80
from .compiled_kernel import Kernel, Source
from .cp_async import LINE, make_swizzled_load
from .device import is_hopper, multiprocessors
from .pipeline import arrive_stage, stage_barrier, stage_index, wait_stage
from .ptx import atomic_increment, divide, shared_address, types
from .ptx_sm90 import (
    barrier_arrive,
    barrier_arrive_after_copies,
    barrier_init,
    barrier_init_fence,
    barrier_wait,
    fence_async_proxy,
    map_acquire,
    map_release,
    named_barrier_arrive,
    named_barrier_sync,
    registers,
    uniform,
)
from .tile_scheduler import (
    BEGIN,
    END,
    HEAD,
    K_COUNT,
    K_FIRST,
    KEY_STARTS,
    OWN,
    Q_COUNT,
    Q_FIRST,
    SLOTS,
    WHOLE,
    make_write_work_tile,
    record_size,
)
from .tma import MAP, copy_maps, make_tma_load, set_map, templates
from .warp_mma import tile_operations
from .warpgroup_mma import keys_of, padded, rows_of, warpgroup_operations, warpgroups_of

GROUP = 128  # threads of a warpgroup
HEAD_DIMS = (64, 80, 96, 128, 256)
_PRODUCER_BARRIER = 8  # the named barrier of the producer warpgroup

# Registers per thread of the producer and of each consumer warpgroup, by number of consumer warpgroups.
_REGISTERS = {2: (40, 232), 3: (32, 160)}


def can_run(q: torch.Tensor, scale: float) -> bool:
    """Whether this path supports a call: compute capability 9, a size in `HEAD_DIMS`, and `prefill_sm80.can_run`."""
    return q.shape[-1] in HEAD_DIMS and is_hopper(q.device.index or 0) and prefill_sm80.can_run(q, scale)


@cache
def make_kernel(head_dim: int, dtype: str, softcap: bool, paged: bool):
    """Return the Python function of a kernel, which `Source` compiles; `paged` as in `prefill_sm80.make_kernel`."""
    keys, rows, groups = keys_of(head_dim), rows_of(head_dim), warpgroups_of(head_dim)
    release_registers, claim_registers = (
        registers(change, count) for change, count in zip(("dec", "inc"), _REGISTERS[groups], strict=True)
    )
    do = warpgroup_operations(head_dim, dtype, softcap)
    start_qk_product, wait_qk_product = do.start_qk_product, do.wait_qk_product
    wait_all_qk_products, softmax_step = do.wait_all_qk_products, do.softmax_step
    start_pv_product, wait_pv_product, rescale, pack = do.start_pv_product, do.wait_pv_product, do.rescale, do.pack
    warp = tile_operations(head_dim, 1, dtype, softcap, keys)
    init_accumulators, apply_mask, store = warp.init, warp.apply_mask, warp.store
    load_rows = make_swizzled_load(head_dim, keys, paged)
    tma_load, tma_load_queries = make_tma_load(head_dim, keys, paged), make_tma_load(head_dim, rows, False)
    tile_bytes, k_offset = keys * padded(head_dim) * 2, rows * padded(head_dim) * 2
    v_offset = k_offset + 2 * tile_bytes
    s_count, o_count, p_count = keys // 2, head_dim // 2, keys // 4
    write_work_tile, record = make_write_work_tile(rows, keys, GROUP, _PRODUCER_BARRIER), record_size(rows)
    records_size, barrier_count = SLOTS * record, 9 + 2 * SLOTS

    @cuda.jit(device=True, inline="always")
    def load_tile(target, map, base, stride, head, number, k_first, k_count, barrier, thread, pages, shift):
        """Load a tile of keys or values: by TMA if all of it belongs to the sequence, else by threads, padded with zeros."""
        first = int32(number * keys)
        if first + keys <= k_count:
            fence_async_proxy()  # threads may have written this stage last
            tma_load(target, map, head, first if paged else int32(k_first + first), barrier, thread, pages, shift)
        else:
            load_rows(target, base, stride, first, k_count, thread, pages, shift)
            barrier_arrive_after_copies(barrier)

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
        key_start,
        key_stop,
        tiles,
        table,
        table_stride,
        shift,
        group,
        factor,
        inner,
        outer,
        heads,
        total_work,
        counter,
        q_rows,
        kv_rows,
        map_templates,
        maps,
    ):
        thread = int32(cuda.threadIdx.x)
        lane = thread & 31
        records, next_work = cuda.shared.array(records_size, int32), cuda.shared.array(1, int32)
        # mbarriers: q_full; k_full, v_full, k_empty and v_empty of two stages each; work_full and work_empty of each record.
        barriers = cuda.shared.array(barrier_count, uint64)
        smem = cuda.shared.array(0, np.uint8)
        q_full = shared_address(barriers)
        k_full, v_full = q_full + uint32(8), q_full + uint32(24)
        k_empty, v_empty = q_full + uint32(40), q_full + uint32(56)
        work_full, work_empty = q_full + uint32(72), q_full + uint32(72 + 8 * SLOTS)
        if thread == 0:
            for number in range(5):
                barrier_init(q_full + uint32(8 * number), uint32(GROUP))
            for number in range(5, 9):
                barrier_init(q_full + uint32(8 * number), uint32(4 * groups))  # one lane of each consumer warp
            for number in range(SLOTS):
                barrier_init(work_full + uint32(8 * number), uint32(GROUP))
                barrier_init(work_empty + uint32(8 * number), uint32(4 * groups))
            barrier_init_fence()
        maps += uint64(3 * MAP) * uint64(cuda.blockIdx.x)
        copy_maps(maps, map_templates, 3, thread)
        cuda.syncthreads()
        q_smem = (shared_address(smem) + uint32(1023)) & uint32(
            0xFFFFFC00
        )  # the swizzle pattern repeats every 1024 bytes
        k_smem, v_smem = q_smem + uint32(k_offset), q_smem + uint32(v_offset)
        role = uniform(thread >> 7)
        # Key tiles of all work tiles so far, which is the next key tile's iteration number.
        tile_count = int32(0)
        work_index = int32(0)

        if role == 0:
            release_registers()
            k_map, v_map = maps + uint64(MAP), maps + uint64(2 * MAP)
            if thread < 32:
                if thread == 0:
                    set_map(maps, q, q_rows)
                    set_map(k_map, k, kv_rows)
                    set_map(v_map, v, kv_rows)
                    map_release()
                cuda.syncwarp()
                map_acquire(maps)
                map_acquire(k_map)
                map_acquire(v_map)
            next_work_index = int32(cuda.blockIdx.x)
            write_work_tile(
                records,
                work_full,
                work_empty,
                int32(0),
                next_work_index,
                total_work,
                heads,
                tiles,
                key_start,
                key_stop,
                thread,
            )
            next_work_index = total_work
            if thread == 0 and counter:
                next_work_index = int32(cuda.gridDim.x) + atomic_increment(counter, int32(1))
            while True:
                record_at = int32((work_index & (SLOTS - 1)) * record)
                head = records[record_at + HEAD]
                if head < 0:
                    break
                k_first, k_count = records[record_at + K_FIRST], records[record_at + K_COUNT]
                begin, end = records[record_at + BEGIN], records[record_at + END]
                kv_head = divide(head, group)
                k_base, v_base = k + uint64(kv_head) * k_head, v + uint64(kv_head) * v_head
                pages = table + uint64(k_first) * table_stride
                if not paged:
                    k_base += uint64(k_first) * k_token
                    v_base += uint64(k_first) * v_token
                if begin < end:
                    first = tile_count
                    if first >= 2:
                        wait_stage(k_empty, int32(first - 2))
                    load_tile(k_smem + stage_index(first) * uint32(tile_bytes), k_map, k_base, k_token, kv_head, begin, k_first, k_count,
                               stage_barrier(k_full, first), thread, pages, shift)  # fmt: skip
                    if (
                        first >= 1
                    ):  # consumers that have read the previous work tile's last keys no longer need its queries
                        wait_stage(k_empty, int32(first - 1))
                    tma_load_queries(q_smem, maps, head, records[record_at + Q_FIRST], q_full, thread, pages, shift)
                # At least once, even without key tiles: the next work tile's record is written here.
                for number in range(begin, max(end, begin + 1)):
                    iteration = int32(tile_count + number - begin)
                    if number + 1 < end:  # the next tile's keys are needed before this one's values
                        after = int32(iteration + 1)
                        if after >= 2:
                            wait_stage(k_empty, int32(after - 2))
                        load_tile(k_smem + stage_index(after) * uint32(tile_bytes), k_map, k_base, k_token, kv_head, number + 1, k_first,
                                   k_count, stage_barrier(k_full, after), thread, pages, shift)  # fmt: skip
                    if number < end:
                        if iteration >= 2:
                            wait_stage(v_empty, int32(iteration - 2))
                        load_tile(v_smem + stage_index(iteration) * uint32(tile_bytes), v_map, v_base, v_token, kv_head, number, k_first, k_count,
                                   stage_barrier(v_full, iteration), thread, pages, shift)  # fmt: skip
                    if number == begin:  # the first tiles are in flight: write the next work tile's record
                        if thread == 0:
                            next_work[0] = next_work_index
                        named_barrier_sync(_PRODUCER_BARRIER, GROUP)
                        work = next_work[0]
                        after = int32(work_index + 1)
                        write_work_tile(
                            records,
                            work_full,
                            work_empty,
                            after,
                            work,
                            total_work,
                            heads,
                            tiles,
                            key_start,
                            key_stop,
                            thread,
                        )
                        if thread == 0 and work < total_work:
                            next_work_index = int32(cuda.gridDim.x) + atomic_increment(counter, int32(1))
                tile_count = int32(tile_count + end - begin)
                work_index = int32(work_index + 1)
        else:
            claim_registers()
            warp = int32((thread >> 5) - 4)
            row = int32(warp * 16 + (lane >> 2))
            records_at = shared_address(records)
            q_at = q_smem + uint32((role - 1) * 64 * LINE)
            # Named barriers, numbered from 1, that order the consumer warpgroups (ping-pong).
            own_barrier, next_barrier = int32(role), int32(role % groups + 1)
            o, s = cuda.local.array(o_count, float32), cuda.local.array(s_count, float32)
            p = cuda.local.array(p_count, int32)
            row_max, row_sum = cuda.local.array(2, float32), cuda.local.array(2, float32)
            factors = cuda.local.array(2, float32)
            column = int32(2 * (lane & 3))
            query_loads = int32(0)  # completed so far; a work tile without keys has none
            if role == groups:
                named_barrier_arrive(next_barrier, 2 * GROUP)
            while True:
                slot = int32(work_index & (SLOTS - 1))
                record_at = int32(slot * record)
                barrier_wait(work_full + uint32(8 * slot), uint32((work_index // SLOTS) & 1))
                # The compiler keeps values that are declared uniform, and what is derived from them, in uniform registers.
                head = uniform(records[record_at + HEAD])
                if head < 0:
                    break
                q_first, count = records[record_at + Q_FIRST], records[record_at + Q_COUNT]
                begin, end = uniform(records[record_at + BEGIN]), uniform(records[record_at + END])
                own = int32(
                    record_at + OWN + 2 * (role - 1)
                )  # the range of tiles that this warpgroup sees, perhaps empty
                own_begin, own_end = uniform(records[own]), uniform(records[own + 1])
                whole = int32(record_at + WHOLE + 2 * warp)
                whole_from, whole_to = records[whole], records[whole + 1]
                key_starts_at, key_stops_at = (
                    records_at + uint32(4 * (record_at + KEY_STARTS)),
                    records_at + uint32(4 * (record_at + KEY_STARTS + rows)),
                )
                init_accumulators(o, row_max, row_sum)
                if begin < end:
                    barrier_wait(q_full, uint32(query_loads & 1))
                    query_loads = int32(query_loads + 1)
                    first = int32(tile_count - begin)  # plus a tile's number is its iteration
                    for number in range(begin, own_begin):
                        skip_tile(int32(first + number), k_full, k_empty, v_full, v_empty, own_barrier, next_barrier, lane)  # fmt: skip
                    if own_begin < own_end:
                        iteration = int32(first + own_begin)
                        wait_stage(k_full, iteration)
                        fence_async_proxy()
                        named_barrier_sync(own_barrier, 2 * GROUP)
                        start_qk_product(s, q_at, k_smem + stage_index(iteration) * uint32(tile_bytes))
                        named_barrier_arrive(next_barrier, 2 * GROUP)
                        wait_all_qk_products(s, inner, outer)
                        arrive_stage(k_empty, iteration, lane)
                        key = int32(own_begin * keys)
                        if key < whole_from or key + keys > whole_to:
                            apply_mask(s, key + column, row, key_starts_at, key_stops_at)
                        softmax_step(s, factors, row_max, row_sum, factor)
                        pack(p, s)
                        for number in range(own_begin + 1, own_end):
                            iteration = int32(first + number)
                            before = int32(iteration - 1)
                            wait_stage(k_full, iteration)
                            fence_async_proxy()
                            named_barrier_sync(own_barrier, 2 * GROUP)
                            start_qk_product(s, q_at, k_smem + stage_index(iteration) * uint32(tile_bytes))
                            wait_stage(v_full, before)
                            fence_async_proxy()
                            start_pv_product(o, p, v_smem + stage_index(before) * uint32(tile_bytes))
                            named_barrier_arrive(next_barrier, 2 * GROUP)
                            wait_qk_product(s, inner, outer)
                            arrive_stage(k_empty, iteration, lane)
                            key = int32(number * keys)
                            if key < whole_from or key + keys > whole_to:
                                apply_mask(s, key + column, row, key_starts_at, key_stops_at)
                            softmax_step(s, factors, row_max, row_sum, factor)
                            wait_pv_product(o, p)
                            arrive_stage(v_empty, before, lane)
                            rescale(o, factors)
                            pack(p, s)
                        iteration = int32(first + own_end - 1)
                        wait_stage(v_full, iteration)
                        fence_async_proxy()
                        start_pv_product(o, p, v_smem + stage_index(iteration) * uint32(tile_bytes))
                        wait_pv_product(o, p)
                        arrive_stage(v_empty, iteration, lane)
                    for number in range(own_end, end):
                        skip_tile(int32(first + number), k_full, k_empty, v_full, v_empty, own_barrier, next_barrier, lane)  # fmt: skip
                    tile_count = int32(tile_count + end - begin)
                target = out + uint64(q_first) * out_token + uint64(head * head_dim * 2)
                store(o, row_sum, target, out_token, row, count, lane)
                cuda.syncwarp()  # all lanes have read the record
                if lane == 0:
                    barrier_arrive(work_empty + uint32(8 * slot))
                work_index = int32(work_index + 1)
            if role == 1:
                named_barrier_sync(own_barrier, 2 * GROUP)  # consume the last arrival of the last warpgroup

    return prefill


@cuda.jit(device=True, inline="always")
def skip_tile(iteration, k_full, k_empty, v_full, v_empty, own_barrier, next_barrier, lane):
    """Skip a tile that none of the warpgroup's rows sees, with the arrivals that the other warpgroups wait for."""
    wait_stage(k_full, iteration)
    cuda.syncwarp()  # a lane that still waits for this phase would miss it once the next one is complete
    arrive_stage(k_empty, iteration, lane)
    named_barrier_sync(own_barrier, 2 * GROUP)
    named_barrier_arrive(next_barrier, 2 * GROUP)
    wait_stage(v_full, iteration)
    cuda.syncwarp()
    arrive_stage(v_empty, iteration, lane)


@dataclass(frozen=True)
class PersistentKernel(prefill_sm80.Compiled):
    """A compiled persistent kernel, one block per multiprocessor; `keys`: keys per tile."""

    keys: int

    def launch(
        self, qkv: Sequence[torch.Tensor], tiles: torch.Tensor, page_size: int | None, arguments: Sequence[float]
    ) -> None:
        q, k, _ = qkv
        total_work = q.shape[1] * len(tiles)
        blocks = min(total_work, multiprocessors(q.device.index or 0))
        # A new counter for each launch: a shared one would count for concurrent launches on two streams.
        counter = torch.zeros(1, dtype=torch.int32, device=q.device) if total_work > blocks else None
        counter_at = 0 if counter is None else counter.data_ptr()
        box_rows = min(self.keys, page_size or self.keys)
        map_templates = templates(qkv, (self.rows, box_rows, box_rows))
        maps = torch.empty(blocks, 3 * MAP, dtype=torch.uint8, device=q.device)
        pointers = (map_templates.data_ptr(), maps.data_ptr())
        self.kernel.launch((blocks, 1), q, *arguments, q.shape[1], total_work, counter_at, len(q), len(k), *pointers)


@cache
def compiled(head_dim: int, dtype: str, softcap: bool, paged: bool, device: int) -> prefill_sm80.Compiled:
    """Return the kernel for a CUDA device index, compiled now (seconds) if it is neither in memory nor on disk.

    Not checked here: `can_run` must be true for the calls that it is launched for.
    """
    kernel = Kernel(source(head_dim, dtype, softcap, paged), device)
    return PersistentKernel(kernel, rows_of(head_dim), keys_of(head_dim))


def source(head_dim: int, dtype: str, softcap: bool, paged: bool) -> Source:
    """Return the `Source` of a kernel.

    Its arguments are those of `prefill_sm80` (strides of the queries are unused) followed by those that
    `PersistentKernel.launch` adds.
    """
    # Queries and two stages of keys and of values, from an address that is a multiple of 1,024.
    smem = 2 * padded(head_dim) * (rows_of(head_dim) + 4 * keys_of(head_dim)) + 1024
    name = f"hopper prefill {head_dim} {dtype} softcap={softcap} paged={paged}"
    make = partial(make_kernel, head_dim, dtype, softcap, paged)
    signature = types.void(
        *prefill_sm80.arguments(),
        *(types.int32, types.int32, types.uint64),
        *(types.int32, types.int32, types.uint64, types.uint64),
    )
    return Source(name, make, signature, (1 + warpgroups_of(head_dim)) * GROUP, 1, smem)
