"""Decode attention on tensor cores, sm_80 and later: few queries per sequence, its keys split between blocks.

    KV split: a range of one sequence's keys for one KV head       long contexts are split so that a small batch fills the GPU
    rows:     its queries times the heads of the group, up to 16   keys and values are read once for all of them
    block:    4 warps; each takes 16 keys of every tile of 64, with its own maxima and sums
              -> combine the warps' sums -> if the sequence is split, the last block to finish combines the splits

Source of split keys: Flash-Decoding (Dao et al. 2023). Blocks of a sequence count themselves when they finish, and the
last one combines all partial results and resets the counter, so no second launch is needed.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from .combine import PARTS, combine_partials, init_combine, make_combine_warps, make_write_row, write_partial
from .compiled_kernel import Kernel, Source
from .cp_async import THREADS, make_group_load, make_load, make_write
from .device import max_smem_per_block, multiprocessors
from .prefill_sm80 import DTYPES, aligned, softmax_factors
from .ptx import (
    atomic_add_acq_rel,
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
from .warp_mma import KEYS, sums_row, tile_operations

ROWS = 16
_WARPS = THREADS // 32
# Pipeline stages of keys and values in shared memory, one in use while the others load: for two blocks per multiprocessor, for
# one, and for GPUs with little shared memory.
_STAGES, _DEEP, _SHALLOW = 3, 5, 2


@cache
def make_kernel(head_dim: int, dtype: str, softcap: bool, stages: int):
    """Return the Python function of a kernel with `stages` pipeline stages, which `Source` compiles."""
    do = tile_operations(head_dim, 1, dtype, softcap, KEYS // _WARPS)
    init_accumulators, qk_product, apply_mask, softmax_step, pv_product, store_partial = (
        do.init,
        do.qk_product,
        do.apply_mask,
        do.softmax_step,
        do.pv_product,
        do.store_partial,
    )
    load_tile = make_load(head_dim, KEYS, paged=True)
    load_queries, write_16_bytes = make_group_load(head_dim, ROWS), make_write(head_dim)
    chunks = head_dim // 8
    combine_warps, write_row = make_combine_warps(_WARPS), make_write_row(dtype)
    row_bytes, sum_bytes = 2 * head_dim + 16, sums_row(head_dim)
    q_bytes, kv_bytes = ROWS * row_bytes, KEYS * row_bytes
    stage = 2 * kv_bytes
    wait_for_tile = copies_wait_but[stages - 2]
    sums, score_count = head_dim // 2, KEYS // _WARPS // 2

    @cuda.jit(device=True, inline="always")
    def write(
        k_base, v_base, kv_token, new_keys, keys_token, new_values, values_token, first, stop, thread, pages, shift
    ):
        """Write new keys and values, `[first, stop)` of a sequence, to their pages."""
        for chunk in range(thread, int32((stop - first) * chunks), THREADS):
            write_16_bytes(k_base, v_base, kv_token, new_keys, keys_token, new_values, values_token,
                           first, int32(chunk), pages, shift)  # fmt: skip

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
        key_start,
        key_stop,
        kv_splits,
        table,
        table_stride,
        shift,
        partials,
        stats,
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
        smem = cuda.shared.array(0, np.uint8)
        q_smem = shared_address(smem)
        entry = kv_splits + uint64(48 * cuda.blockIdx.y)
        q_first, queries = load_int(entry), load_int(entry + uint64(4))
        count = queries * group
        sequence, split_start = load_int(entry + uint64(8)), load_int(entry + uint64(12))
        split_stop, split = load_int(entry + uint64(16)), load_int(entry + uint64(20))
        splits, first_partial = load_int(entry + uint64(24)), load_int(entry + uint64(28))
        pages = table + uint64(sequence) * table_stride
        k_base, v_base = keys + uint64(kv_head) * kv_head_stride, values + uint64(kv_head) * kv_head_stride
        head = uint64(kv_head) * uint64(group)
        load_queries(q_smem, q + uint64(q_first) * q_token + head * q_head, q_token, q_head, group, count, thread)
        copies_commit()
        if split_start + thread * 16 < split_stop:
            prefetch(pages + uint64(4 * ((split_start + thread * 16) >> shift)))
        write_start = (
            split_stop  # keys from here on are not in their pages yet; the one split that reads a key writes it
        )
        if new_keys:
            first_new = load_int(entry + uint64(32)) - queries
            write_start = max(first_new, split_start)
            token, new_head = uint64(q_first + write_start - first_new), uint64(kv_head)
            new_keys += token * new_keys_token + new_head * new_keys_head
            new_values += token * new_values_token + new_head * new_values_head
        # Smallest key_start and largest key_stop of rows that see a key; largest key_start and smallest key_stop of all rows.
        bounds = cuda.shared.array(4, int32)
        key_starts, key_stops = cuda.shared.array(ROWS, int32), cuda.shared.array(ROWS, int32)
        if thread == 0:
            bounds[0], bounds[1], bounds[2], bounds[3] = int32(1 << 30), int32(0), int32(-1), int32(1 << 30)
        cuda.syncthreads()
        if thread < ROWS:
            key_starts[thread], key_stops[thread] = int32(1 << 30), int32(0)
            if thread < count:
                place = uint64(4 * (q_first + divide(thread, group)))
                first, stop = max(load_int(key_start + place), split_start), min(load_int(key_stop + place), split_stop)
                key_starts[thread], key_stops[thread] = first, stop
                cuda.atomic.max(bounds, 2, first)
                cuda.atomic.min(bounds, 3, stop)
                if first < stop:
                    cuda.atomic.min(bounds, 0, first)
                    cuda.atomic.max(bounds, 1, stop)
        cuda.syncthreads()
        begin, end = bounds[0] // KEYS, (bounds[1] + KEYS - 1) // KEYS
        whole_from, whole_to = bounds[2], bounds[3]

        k_smem, v_smem = q_smem + uint32(q_bytes), q_smem + uint32(q_bytes + kv_bytes)
        q_address = q_smem + uint32((lane & 15) * row_bytes + (lane >> 4) * 16)
        k_address = k_smem + uint32((warp * 16 + (lane & 7) + (lane >> 4) * 8) * row_bytes + ((lane >> 3) & 1) * 16)
        v_address = v_smem + uint32((warp * 16 + (lane & 15)) * row_bytes + (lane >> 4) * 16)
        key_starts_at, key_stops_at = shared_address(key_starts), shared_address(key_stops)

        o, four, running = cuda.local.array(sums, float32), cuda.local.array(4, float32), cuda.local.array(2, float32)
        s = cuda.local.array(score_count, float32)
        row_max, row_sum = cuda.local.array(2, float32), cuda.local.array(2, float32)
        init_accumulators(o, row_max, row_sum)
        if begin < end:
            for ahead in range(stages - 1):
                if begin + ahead < end:
                    first = int32((begin + ahead) * KEYS)
                    load_offset = uint32(ahead * stage)
                    if write_start < min(first + int32(KEYS), split_stop):
                        write(k_base, v_base, kv_token, new_keys, new_keys_token, new_values, new_values_token,
                              write_start, split_stop, thread, pages, shift)  # fmt: skip
                        write_start = split_stop
                        cuda.syncthreads()
                    load_tile(k_smem + load_offset, k_base, kv_token, first, split_stop, thread, pages, shift)
                    load_tile(v_smem + load_offset, v_base, kv_token, first, split_stop, thread, pages, shift)
                copies_commit()
        # New keys past the first tiles: those need not wait for this write. The loop's barrier precedes the next tile's load.
        write(k_base, v_base, kv_token, new_keys, new_keys_token, new_values, new_values_token,
              write_start, split_stop, thread, pages, shift)  # fmt: skip
        stage_offset = uint32(0)  # of this tile's pipeline stage
        for number in range(begin, end):
            key = int32(number * KEYS)
            wait_for_tile()
            cuda.syncthreads()  # this tile has arrived, and all warps are done with the previous one
            if number + stages - 1 < end:
                load_offset = stage_offset + uint32((stages - 1) * stage)
                if load_offset >= uint32(stages * stage):
                    load_offset -= uint32(stages * stage)
                first = key + int32((stages - 1) * KEYS)
                load_tile(k_smem + load_offset, k_base, kv_token, first, split_stop, thread, pages, shift)
                load_tile(v_smem + load_offset, v_base, kv_token, first, split_stop, thread, pages, shift)
            copies_commit()
            qk_product(s, q_address, k_address + stage_offset, inner, outer)
            if key < whole_from or key + KEYS > whole_to:
                apply_mask(s, key + warp * 16 + int32(2 * (lane & 3)), lane >> 2, key_starts_at, key_stops_at)
            softmax_step(s, o, row_max, row_sum, factor)
            pv_product(o, s, v_address + stage_offset)
            stage_offset += uint32(stage)
            if stage_offset == uint32(stages * stage):
                stage_offset = uint32(0)

        copies_wait_all()
        cuda.syncthreads()  # all warps are done with the tiles, which the sums overwrite
        warp_sums, warp_stats = uint32(ROWS * sum_bytes), uint32(ROWS * 8)
        stats_at = q_smem + uint32(_WARPS) * warp_sums
        own = uint32(warp)
        store_partial(o, row_max, row_sum, q_smem + own * warp_sums, stats_at + own * warp_stats, count, lane)
        cuda.syncthreads()
        slot = uint64(first_partial + split) * uint64(kv_heads) + uint64(kv_head)
        step = uint64(kv_heads * ROWS)  # rows from one split's stats to the next
        target = out + uint64(q_first) * out_token + uint64(kv_head * group * head_dim * 2)
        for quad in range(thread, count * head_dim // 4, THREADS):
            row = 4 * quad // head_dim
            channel = 4 * quad - row * head_dim
            init_combine(four, running)
            sums_at = q_smem + uint32(row * sum_bytes + 4 * channel)
            combine_warps(four, running, sums_at, warp_sums, stats_at + uint32(8 * row), warp_stats, factor)
            if splits == 1:
                query = divide(row, group)
                place = target + uint64(query) * out_token
                write_row(four, running, place + uint64(2 * (4 * quad - query * group * head_dim)))
            else:
                part = partials + uint64(4) * (slot * uint64(ROWS * head_dim) + uint64(4 * quad))
                write_partial(four, running, part, stats + uint64(8) * (slot * uint64(ROWS) + uint64(row)))
        if splits > 1:
            cuda.syncthreads()
            if thread == 0:
                counter = counters + uint64(4 * (sequence * kv_heads + kv_head))
                bounds[0] = atomic_add_acq_rel(counter, int32(1))
                if bounds[0] == splits - 1:
                    store_int(counter, int32(0))
            cuda.syncthreads()
            if bounds[0] == splits - 1:
                first_slot = uint64(first_partial) * uint64(kv_heads) + uint64(kv_head)
                for quad in range(thread, count * head_dim // 4, THREADS):
                    row = 4 * quad // head_dim
                    part = partials + uint64(4) * (first_slot * uint64(ROWS * head_dim) + uint64(4 * quad))
                    partial_stats = stats + uint64(8) * (first_slot * uint64(ROWS) + uint64(row))
                    init_combine(four, running)
                    for first in range(0, splits, PARTS):
                        split_offset = uint64(first) * step
                        combine_partials(
                            four, running, part + split_offset * uint64(4 * head_dim), step * uint64(4 * head_dim),
                            partial_stats + split_offset * uint64(8), step * uint64(8), splits - first, factor,
                        )  # fmt: skip
                    query = divide(row, group)
                    channel = 4 * quad - query * group * head_dim
                    write_row(four, running, target + uint64(query) * out_token + uint64(2 * channel))

    return decode


def _smem_bytes(head_dim: int, stages: int) -> int:
    """Bytes of shared memory: queries and tiles, which the sums and stats of all warps overwrite afterwards."""
    row_bytes = 2 * head_dim + 16
    return max((ROWS + stages * 2 * KEYS) * row_bytes, _WARPS * ROWS * (sums_row(head_dim) + 8))


def signature() -> Any:
    """Return a kernel's Numba signature."""
    address, stride = types.uint64, types.uint64
    bounds, scratch = (address, address), (address, address, address)
    new = (address, stride, stride, address, stride, stride)
    return types.void(
        address, stride, stride, address, address, stride, stride, address, stride,
        *bounds, address, address, stride, types.int32, *scratch, *new, types.int32, types.float32, types.float32, types.float32,
    )  # fmt: skip


@cache
def compiled(head_dim: int, dtype: str, softcap: bool, stages: int, device: int) -> Kernel:
    """Return the kernel for a device, compiled now (seconds) if it is neither in memory nor on disk."""
    return Kernel(source(head_dim, dtype, softcap, stages), device)


def source(head_dim: int, dtype: str, softcap: bool, stages: int) -> Source:
    """Return the `Source` of a kernel: its function, its name in the cache, and its threads and shared memory."""
    make = partial(make_kernel, head_dim, dtype, softcap, stages)
    name = f"decode {head_dim} {dtype} softcap={softcap} stages={stages}"
    return Source(name, make, signature(), THREADS, blocks_of(head_dim, stages), _smem_bytes(head_dim, stages))


def blocks_of(head_dim: int, stages: int) -> int:
    """Return how many blocks of a kernel should be resident on a multiprocessor; this bounds its registers."""
    return 2 if head_dim <= 128 and stages == _STAGES else 1


def choose_stages(head_dim: int, blocks: int, multiprocessors: int, smem: int) -> int:
    """Return the pipeline stages for a launch of `blocks` blocks with at most `smem` bytes of shared memory each."""
    wanted = (_DEEP, _STAGES, _SHALLOW) if blocks <= multiprocessors else (_STAGES, _SHALLOW)
    return next((stages for stages in wanted if _smem_bytes(head_dim, stages) <= smem), _SHALLOW)


def launch(q, keys, values, out, key_start, key_stop, plan, new, scale, softcap) -> None:
    """Launch the KV splits of a `paged_launch.DevicePlan` into `out`, on the current stream.

    `keys`, `values`: the cache of one layer, `[slots, kv_heads, head_dim]`. `new`: keys and values of the queries'
    tokens, which the kernel also writes into the cache, or None.
    """
    q = aligned(q)
    heads, head_dim = q.shape[1:]
    kv_heads = keys.shape[1]
    device = q.device.index or 0
    stages = choose_stages(
        head_dim, kv_heads * len(plan.kv_splits), multiprocessors(device), max_smem_per_block(device)
    )
    kernel = compiled(head_dim, DTYPES[q.dtype], softcap > 0, stages, device)
    factor, inner = softmax_factors(scale, softcap)
    size = q.element_size()
    rows = max(plan.partials, 1) * kv_heads * ROWS
    scratch = torch.empty(rows * (head_dim + 2), dtype=torch.float32, device=q.device)
    at, written = scratch.data_ptr(), [0] * 6
    if new is not None:
        new = [aligned(x) for x in new]  # keeps aligned copies alive until the launch
        written = [number for x in new for number in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)]
    kernel.launch(
        (kv_heads, len(plan.kv_splits)), q, q.data_ptr(), q.stride(0) * size, q.stride(1) * size, keys.data_ptr(), values.data_ptr(),
        keys.stride(0) * size, keys.stride(1) * size, out.data_ptr(), out.stride(0) * size,
        key_start.data_ptr(), key_stop.data_ptr(), plan.kv_splits.data_ptr(),
        plan.block_table.data_ptr(), 4 * plan.block_table.stride(0), plan.page_size.bit_length() - 1, at, at + 4 * rows * head_dim, plan.counters.data_ptr(),
        *written, heads // kv_heads, factor, inner, softcap,
    )  # fmt: skip
