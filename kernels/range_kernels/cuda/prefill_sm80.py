"""Prefill attention on tensor cores, sm_80 and later (the path "tensor-core"), with mma.sync and cp.async.

    block: 4 warps, 64 or 128 queries of one head            FlashAttention-2's tiling (Dao 2023, arXiv:2307.08691)
    bounds of the block's rows -> first and last key tile    no mask in memory: key_start and key_stop are the whole mask
    for each key tile:   wait for K and V -> start loading the next K and V -> s = q k^T -> apply_mask, only in tiles that some
                         row sees in part -> softmax step -> o += p v

A tile that every row of the block sees in full needs no masking; a tile that no row sees is never read. So bidirectional spans
cost as much as causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from .compiled_kernel import Kernel, Source
from .cp_async import THREADS, make_load
from .device import max_smem_per_block
from .ptx import copies_commit, copies_wait_all, divide, load_int, shared_address, types
from .tile_plan import device_tiles
from .warp_mma import KEYS, LOG2_E, tile_operations

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def can_run(q: torch.Tensor, scale: float) -> bool:
    """Whether this path supports a call: by the GPU, its shared memory, dtype, head size, and a scale above 0.

    (The maximum of a row is taken before scaling, so the scale must keep the order of the scores.)
    """
    return scale > 0 and _can_run(q.dtype, q.shape[-1], q.device.index or 0, max_smem_per_block(q.device.index or 0))


@cache
def _can_run(dtype: torch.dtype, head_dim: int, device: int, smem: int) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0) or dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return False
    return choose_shape(head_dim, smem) is not None


@dataclass(frozen=True)
class Shape:
    """How many queries a block has (`rows`), and how many pipeline stages (`stages`): with 2, the next tile of keys and values is loaded
    while one is used; with 1, after it."""

    rows: int
    stages: int

    def smem_bytes(self, head_dim: int) -> int:
        """Bytes of dynamic shared memory."""
        return (self.rows + 2 * self.stages * KEYS) * (2 * head_dim + 16)

    def total_smem_bytes(self, head_dim: int) -> int:
        """Bytes of dynamic shared memory and of the bounds of the queries."""
        return self.smem_bytes(head_dim) + 8 * self.rows + 16


@cache
def make_kernel(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool):
    """Return the Python function of a kernel, which `Source` compiles.

    If `paged`, keys and values are in pages, and the third number of a tile (see `tile_plan.plan_tiles`) is not the
    sequence's first key but its row in the block table.
    """
    rows, double_buffered = shape.rows, shape.stages == 2
    m_tiles = rows // 64
    do = tile_operations(head_dim, m_tiles, dtype, softcap)
    init_accumulators, qk_product, apply_mask = do.init, do.qk_product, do.apply_mask
    softmax_step, pv_product, store = do.softmax_step, do.pv_product, do.store
    row_bytes = 2 * head_dim + 16
    q_bytes, kv_bytes = rows * row_bytes, KEYS * row_bytes
    stage = 2 * kv_bytes  # bytes of a pipeline stage: one tile of keys and one of values
    sums, score_count, pairs = m_tiles * head_dim // 2, m_tiles * KEYS // 2, 2 * m_tiles

    load_queries, load_tile = make_load(head_dim, rows), make_load(head_dim, KEYS, paged)

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
    ):
        head = cuda.blockIdx.x
        tile = cuda.gridDim.y - 1 - cuda.blockIdx.y  # late queries see the most keys, so they start first
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        entry = tiles + uint64(16 * tile)
        q_first, count = load_int(entry), load_int(entry + uint64(4))
        k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
        # Smallest key_start and largest key_stop of rows that see a key; largest key_start and smallest key_stop of all rows.
        bounds = cuda.shared.array(4, int32)
        key_starts, key_stops = cuda.shared.array(rows, int32), cuda.shared.array(rows, int32)
        smem = cuda.shared.array(0, np.uint8)
        if thread == 0:
            bounds[0], bounds[1], bounds[2], bounds[3] = int32(1 << 30), int32(0), int32(-1), int32(1 << 30)
        cuda.syncthreads()
        if thread < rows:
            key_starts[thread], key_stops[thread] = int32(1 << 30), int32(0)
            if thread < count:
                offset = uint64(4 * (q_first + thread))
                first, stop = max(load_int(key_start + offset), 0), min(load_int(key_stop + offset), k_count)
                key_starts[thread], key_stops[thread] = first, stop
                cuda.atomic.max(bounds, 2, first)
                cuda.atomic.min(bounds, 3, stop)
                if first < stop:
                    cuda.atomic.min(bounds, 0, first)
                    cuda.atomic.max(bounds, 1, stop)
        cuda.syncthreads()
        begin, end = bounds[0] // KEYS, (bounds[1] + KEYS - 1) // KEYS
        whole_from, whole_to = bounds[2], bounds[3]

        q_smem = shared_address(smem)
        k_smem, v_smem = q_smem + uint32(q_bytes), q_smem + uint32(q_bytes + kv_bytes)
        kv_head = uint64(divide(int32(head), group))
        q_base = q + uint64(q_first) * q_token + uint64(head) * q_head
        k_base, v_base = k + kv_head * k_head, v + kv_head * v_head
        pages = table + uint64(k_first) * table_stride
        if not paged:
            k_base += uint64(k_first) * k_token
            v_base += uint64(k_first) * v_token

        # This lane's addresses of 16-byte rows for ldmatrix: queries and values by 16 rows, keys by 8 and 8.
        q_address = q_smem + uint32((warp * 16 * m_tiles + (lane & 15)) * row_bytes + (lane >> 4) * 16)
        k_address = k_smem + uint32(((lane & 7) + (lane >> 4) * 8) * row_bytes + ((lane >> 3) & 1) * 16)
        v_address = v_smem + uint32((lane & 15) * row_bytes + (lane >> 4) * 16)
        key_starts_at, key_stops_at = shared_address(key_starts), shared_address(key_stops)
        row = warp * 16 * m_tiles + (lane >> 2)

        o = cuda.local.array(sums, float32)
        s = cuda.local.array(score_count, float32)
        row_max, row_sum = cuda.local.array(pairs, float32), cuda.local.array(pairs, float32)
        init_accumulators(o, row_max, row_sum)
        if begin < end:
            load_queries(q_smem, q_base, q_token, int32(0), count, thread, pages, shift)
            load_tile(k_smem, k_base, k_token, int32(begin * KEYS), k_count, thread, pages, shift)
            load_tile(v_smem, v_base, v_token, int32(begin * KEYS), k_count, thread, pages, shift)
            copies_commit()
        stage_offset = uint32(0)  # of this tile's pipeline stage
        for number in range(begin, end):
            key = int32(number * KEYS)
            copies_wait_all()
            cuda.syncthreads()  # this tile has arrived, and all warps are done with the previous one
            if double_buffered and number + 1 < end:
                load_offset = uint32(stage) - stage_offset
                load_tile(k_smem + load_offset, k_base, k_token, int32(key + KEYS), k_count, thread, pages, shift)
                load_tile(v_smem + load_offset, v_base, v_token, int32(key + KEYS), k_count, thread, pages, shift)
                copies_commit()
            qk_product(s, q_address, k_address + stage_offset, inner, outer)
            if key < whole_from or key + KEYS > whole_to:
                apply_mask(s, key + int32(2 * (lane & 3)), row, key_starts_at, key_stops_at)
            softmax_step(s, o, row_max, row_sum, factor)
            pv_product(o, s, v_address + stage_offset)
            if double_buffered:
                stage_offset = uint32(stage) - stage_offset
            else:
                cuda.syncthreads()  # all warps are done with this tile
                if number + 1 < end:
                    load_tile(k_smem, k_base, k_token, int32(key + KEYS), k_count, thread, pages, shift)
                    load_tile(v_smem, v_base, v_token, int32(key + KEYS), k_count, thread, pages, shift)
                    copies_commit()
        target = out + uint64(q_first) * out_token + uint64(head * head_dim * 2)
        store(o, row_sum, target, out_token, row, count, lane)

    return prefill


@dataclass(frozen=True)
class Compiled:
    """A compiled prefill kernel and its queries per block."""

    kernel: Kernel
    rows: int

    def launch(
        self, qkv: Sequence[torch.Tensor], tiles: torch.Tensor, page_size: int | None, arguments: Sequence[float]
    ) -> None:
        """Launch the kernel over all query heads and tiles; `page_size` is None if keys are not paged."""
        q = qkv[0]
        self.kernel.launch((q.shape[1], len(tiles)), q, *arguments)


def compiled(head_dim: int, dtype: str, softcap: bool, paged: bool, device: int) -> Compiled:
    """Return the kernel for a CUDA device index, compiled now (seconds) if it is neither in memory nor on disk.

    Not checked here: `can_run` must be true for the calls that it is launched for.
    """
    shape = choose_shape(head_dim, max_smem_per_block(device))
    assert shape is not None
    return _compiled(head_dim, shape, dtype, softcap, paged, device)


@cache
def _compiled(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool, device: int) -> Compiled:
    return Compiled(Kernel(source(head_dim, shape, dtype, softcap, paged), device), shape.rows)


def source(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool) -> Source:
    """Return the `Source` of a kernel: its function, its name in the cache, and its threads and shared memory."""
    name = f"tensor-core prefill {head_dim} {shape} {dtype} softcap={softcap} paged={paged}"
    blocks = 2 if head_dim <= 128 else 1
    make = partial(make_kernel, head_dim, shape, dtype, softcap, paged)
    return Source(name, make, signature(), THREADS, blocks, shape.smem_bytes(head_dim))


def choose_shape(head_dim: int, limit: int) -> Shape | None:
    """Return the largest shape that needs at most `limit` bytes of shared memory, or None if none fits."""
    wanted = (Shape(128, 2), Shape(64, 2)) if head_dim <= 128 else (Shape(64, 2), Shape(64, 1))
    return next((shape for shape in wanted if shape.total_smem_bytes(head_dim) <= limit), None)


def signature() -> Any:
    """Return a kernel's Numba signature."""
    return types.void(*arguments())


def arguments() -> tuple[Any, ...]:
    """Return the argument types of every prefill kernel: addresses, since Numba's arrays cost 10 us each per launch."""
    address, stride = types.uint64, types.uint64
    tensor = (address, stride, stride)
    bounds_and_tiles, table = (address, address, address), (address, stride, types.int32)
    factors = (types.float32, types.float32, types.float32)
    return *tensor, *tensor, *tensor, address, stride, *bounds_and_tiles, *table, types.int32, *factors


def launch(
    compile: Callable[..., Compiled],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    key_start: torch.Tensor,
    key_stop: torch.Tensor,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    scale: float,
    softcap: float,
) -> None:
    """Launch `range_kernels.attention` into `out` on the current stream, with the kernel that `compile` returns.

    `compile` is `compiled` of this module or of `prefill_sm90`, whose `can_run` must be true for the call.
    """
    q, k, v = (aligned(x) for x in (q, k, v))
    kernel = compile(q.shape[2], DTYPES[q.dtype], softcap > 0, False, q.device.index or 0)
    tiles = device_tiles(cu_seqlens_q, cu_seqlens_k, kernel.rows, q.device)
    launch_tiles(kernel, (q, k, v), out, key_start, key_stop, tiles, None, None, scale, softcap)


def launch_tiles(made: Compiled, qkv, out, key_start, key_stop, tiles, table, page_size, scale, softcap) -> None:
    """Launch a compiled prefill kernel over `tiles`, int32 `[tiles, 4]` on the device.

    `qkv`: queries `[queries, q_heads, head_dim]`, keys and values `[keys, kv_heads, head_dim]`. If paged, keys and
    values are the whole cache `[slots, kv_heads, head_dim]`, and `table` (the block table) and `page_size` are given;
    else both are None.
    """
    q, k = qkv[:2]
    factor, inner = softmax_factors(scale, softcap)
    size = q.element_size()
    tensors = [number for x in qkv for number in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)]
    pages = (0, 0) if table is None else (table.data_ptr(), 4 * table.stride(0))
    shift = (page_size or 1).bit_length() - 1
    bounds = (key_start.data_ptr(), key_stop.data_ptr())
    group = q.shape[1] // k.shape[1]
    arguments = (*tensors, out.data_ptr(), out.stride(0) * size, *bounds, tiles.data_ptr(), *pages, shift, group)
    made.launch(qkv, tiles, page_size, (*arguments, factor, inner, softcap))


def softmax_factors(scale: float, softcap: float) -> tuple[float, float]:
    """Return the factor on scores before exp2, and the factor before tanh (0 without softcap)."""
    return (LOG2_E, scale / softcap) if softcap > 0 else (scale * LOG2_E, 0.0)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if its rows allow 16-byte copies, else an aligned copy."""
    size = x.element_size()
    strides = [x.stride(0) * size, x.stride(1) * size]
    fits = x.stride(2) == 1 and not x.data_ptr() % 16 and not any(stride % 16 or stride < 1 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # a contiguous tensor may be misaligned
