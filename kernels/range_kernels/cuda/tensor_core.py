"""Prefill attention on tensor cores, sm_80 and later: mma.sync, tiles in shared memory, copies in the background.

    block: 4 warps, 64 or 128 queries of one head          FlashAttention-2's shape (Dao 2023, arXiv:2307.08691)
    bounds of the block's rows -> first and last key tile   no mask in memory: low and reach say all
    for each key tile:   K and V here? -> start the next two -> s = q k^T -> hide, only in tiles that some row sees in part
                         -> weights -> o += weights V

A tile that every row of the block sees whole costs no masking, a tile that none sees is never read. So bidirectional spans cost
what causal attention costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, float32, int32, uint32, uint64

from .device import block_room
from .fetch import THREADS, make_fetch
from .kernel import Kernel, Source
from .ptx import copies_commit, copies_wait_all, divide, load_int, shared_address, types
from .tile import KEYS, LOG2_E, tile_operations
from .tiles import device_tiles

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def can_run(q: torch.Tensor, scale: float) -> bool:
    """Whether this path computes such a call: dtype, head size, a scale that keeps the order of scores, a device with room."""
    capable = torch.cuda.get_device_capability(q.device) >= (8, 0)
    if not capable or q.dtype not in DTYPES or q.shape[-1] not in HEAD_DIMS or scale <= 0:
        return False
    return choose_shape(q.shape[-1], block_room(q.device.index or 0)) is not None


@dataclass(frozen=True)
class Shape:
    """Queries of a block, and tiles of keys and values that it has room for: the next comes while one is used, or after it."""

    rows: int
    stages: int

    def room(self, head_dim: int) -> int:
        """Bytes of dynamic shared memory."""
        return (self.rows + 2 * self.stages * KEYS) * (2 * head_dim + 16)

    def all_room(self, head_dim: int) -> int:
        """That, and the bounds of the queries."""
        return self.room(head_dim) + 8 * self.rows + 16


@cache
def make_kernel(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool):
    """The Python function of a kernel.

    Where paged, keys lie in pages and the third number of a tile is its sequence's row of the block table.
    """
    rows, ahead = shape.rows, shape.stages == 2
    m_tiles = rows // 64
    do = tile_operations(head_dim, m_tiles, dtype, softcap)
    begin_sums, score, hide, weigh, add_values, store = (
        do.start,
        do.scores,
        do.hide,
        do.weights,
        do.add_values,
        do.store,
    )
    row_bytes = 2 * head_dim + 16
    q_room, kv_room = rows * row_bytes, KEYS * row_bytes
    stage = 2 * kv_room  # keys and values of a tile; the next is fetched while this one is used
    sums, score_count, pairs = m_tiles * head_dim // 2, m_tiles * KEYS // 2, 2 * m_tiles

    fetch_queries, fetch = make_fetch(head_dim, rows), make_fetch(head_dim, KEYS, paged)

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
        lane, warp = thread & 31, thread >> 5
        entry = tiles + uint64(16 * tile)
        q_first, count = load_int(entry), load_int(entry + uint64(4))
        k_first, k_count = load_int(entry + uint64(8)), load_int(entry + uint64(12))
        bounds = cuda.shared.array(4, int32)  # smallest low, largest reach, largest low, smallest reach
        lows, reaches = cuda.shared.array(rows, int32), cuda.shared.array(rows, int32)
        room = cuda.shared.array(0, np.uint8)
        if thread == 0:
            bounds[0], bounds[1], bounds[2], bounds[3] = int32(1 << 30), int32(-1), int32(-1), int32(1 << 30)
        cuda.syncthreads()
        if thread < rows:
            lows[thread], reaches[thread] = int32(1 << 30), int32(-1)
            if thread < count:
                place = uint64(4 * (q_first + thread))
                first, last = max(load_int(low + place), 0), min(load_int(reach + place), k_count - 1)
                lows[thread], reaches[thread] = first, last
                cuda.atomic.max(bounds, 2, first)
                cuda.atomic.min(bounds, 3, last)
                if first <= last:
                    cuda.atomic.min(bounds, 0, first)
                    cuda.atomic.max(bounds, 1, last)
        cuda.syncthreads()
        begin, end = bounds[0] // KEYS, (bounds[1] + KEYS) // KEYS
        whole_from, whole_to = bounds[2], bounds[3]

        q_room_at = shared_address(room)
        k_room_at, v_room_at = q_room_at + uint32(q_room), q_room_at + uint32(q_room + kv_room)
        kv_head = uint64(divide(int32(head), group))
        q_base = q + uint64(q_first) * q_token + uint64(head) * q_head
        k_base, v_base = k + kv_head * k_head, v + kv_head * v_head
        pages = table + uint64(k_first) * table_stride
        if not paged:
            k_base += uint64(k_first) * k_token
            v_base += uint64(k_first) * v_token

        # Where this lane's rows of 16 bytes begin for ldmatrix: queries and values by 16 rows, keys by 8 and 8.
        q_address = q_room_at + uint32((warp * 16 * m_tiles + (lane & 15)) * row_bytes + (lane >> 4) * 16)
        k_address = k_room_at + uint32(((lane & 7) + (lane >> 4) * 8) * row_bytes + ((lane >> 3) & 1) * 16)
        v_address = v_room_at + uint32((lane & 15) * row_bytes + (lane >> 4) * 16)
        lows_at, reaches_at = shared_address(lows), shared_address(reaches)
        row = warp * 16 * m_tiles + (lane >> 2)

        o = cuda.local.array(sums, float32)
        s = cuda.local.array(score_count, float32)
        largest, total = cuda.local.array(pairs, float32), cuda.local.array(pairs, float32)
        begin_sums(o, largest, total)
        if begin < end:
            fetch_queries(q_room_at, q_base, q_token, int32(0), count, thread, pages, shift)
            fetch(k_room_at, k_base, k_token, int32(begin * KEYS), k_count, thread, pages, shift)
            fetch(v_room_at, v_base, v_token, int32(begin * KEYS), k_count, thread, pages, shift)
            copies_commit()
        here = uint32(0)  # which of two rooms holds this tile
        for number in range(begin, end):
            key = int32(number * KEYS)
            copies_wait_all()
            cuda.syncthreads()  # this tile is here, and all have left the one before
            if ahead and number + 1 < end:
                there = uint32(stage) - here
                fetch(k_room_at + there, k_base, k_token, int32(key + KEYS), k_count, thread, pages, shift)
                fetch(v_room_at + there, v_base, v_token, int32(key + KEYS), k_count, thread, pages, shift)
                copies_commit()
            score(s, q_address, k_address + here, inner, outer)
            if key < whole_from or key + KEYS - 1 > whole_to:
                hide(s, key + int32(2 * (lane & 3)), row, lows_at, reaches_at)
            weigh(s, o, largest, total, factor)
            add_values(o, s, v_address + here)
            if ahead:
                here = uint32(stage) - here
            else:
                cuda.syncthreads()  # all have left this tile
                if number + 1 < end:
                    fetch(k_room_at, k_base, k_token, int32(key + KEYS), k_count, thread, pages, shift)
                    fetch(v_room_at, v_base, v_token, int32(key + KEYS), k_count, thread, pages, shift)
                    copies_commit()
        target = out + uint64(q_first) * out_token + uint64(head * head_dim * 2)
        store(o, total, target, out_token, row, count, lane)

    return prefill


@dataclass(frozen=True)
class Compiled:
    """A prefill kernel that is ready to launch, and queries a block."""

    kernel: Kernel
    rows: int

    def launch(
        self, qkv: Sequence[torch.Tensor], tiles: torch.Tensor, page_size: int | None, arguments: Sequence[float]
    ) -> None:
        """Run it over all heads of the queries and all tiles; keys are in pages or, where `page_size` is None, not."""
        q = qkv[0]
        self.kernel.launch((q.shape[1], len(tiles)), q, *arguments)


def compiled(head_dim: int, dtype: str, softcap: bool, paged: bool, device: int) -> Compiled:
    """The kernel on a device. Needs `can_run`."""
    shape = choose_shape(head_dim, block_room(device))
    assert shape is not None
    return _compiled(head_dim, shape, dtype, softcap, paged, device)


@cache
def _compiled(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool, device: int) -> Compiled:
    return Compiled(Kernel(source(head_dim, shape, dtype, softcap, paged), device), shape.rows)


def source(head_dim: int, shape: Shape, dtype: str, softcap: bool, paged: bool) -> Source:
    """What the kernel is made from."""
    name = f"tensor-core prefill {head_dim} {shape} {dtype} softcap={softcap} paged={paged}"
    blocks = 2 if head_dim <= 128 else 1
    make = partial(make_kernel, head_dim, shape, dtype, softcap, paged)
    return Source(name, make, signature(), THREADS, blocks, shape.room(head_dim))


def choose_shape(head_dim: int, room: int) -> Shape | None:
    """The largest blocks whose shared memory is at most `room` bytes; None where nothing fits."""
    wanted = (Shape(128, 2), Shape(64, 2)) if head_dim <= 128 else (Shape(64, 2), Shape(64, 1))
    return next((shape for shape in wanted if shape.all_room(head_dim) <= room), None)


def signature() -> Any:
    """Types of a kernel's arguments."""
    return types.void(*arguments())


def arguments() -> tuple[Any, ...]:
    """Types of the arguments that every prefill kernel takes: addresses, since Numba's arrays cost 10 us each at a launch."""
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
    low: torch.Tensor,
    reach: torch.Tensor,
    lengths_q: np.ndarray,
    lengths_k: np.ndarray,
    scale: float,
    softcap: float,
) -> None:
    """See `range_kernels.attention`; fills `out` by the kernel that `compile` makes. Needs `can_run`."""
    q, k, v = (aligned(x) for x in (q, k, v))
    made = compile(q.shape[2], DTYPES[q.dtype], softcap > 0, False, q.device.index or 0)
    tiles = device_tiles(lengths_q, lengths_k, made.rows, q.device)
    launch_tiles(made, (q, k, v), out, low, reach, tiles, None, None, scale, softcap)


def launch_tiles(made: Compiled, qkv, out, low, reach, tiles, table, page_size, scale, softcap) -> None:
    """Run a compiled prefill kernel over tiles; `k`, `v` `[places, kv_heads, head_dim]`, with their block table where paged."""
    q, k = qkv[:2]
    factor, inner = softmax_factors(scale, softcap)
    size = q.element_size()
    tensors = [number for x in qkv for number in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)]
    pages = (0, 0) if table is None else (table.data_ptr(), 4 * table.stride(0))
    shift = (page_size or 1).bit_length() - 1
    bounds = (low.data_ptr(), reach.data_ptr())
    group = q.shape[1] // k.shape[1]
    arguments = (*tensors, out.data_ptr(), out.stride(0) * size, *bounds, tiles.data_ptr(), *pages, shift, group)
    made.launch(qkv, tiles, page_size, (*arguments, factor, inner, softcap))


def softmax_factors(scale: float, softcap: float) -> tuple[float, float]:
    """What scores are multiplied with before exp2, and before tanh."""
    return (LOG2_E, scale / softcap) if softcap > 0 else (scale * LOG2_E, 0.0)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor as it is where 16-byte copies of its rows work, else a copy where they do."""
    size = x.element_size()
    strides = [x.stride(0) * size, x.stride(1) * size]
    fits = x.stride(2) == 1 and not x.data_ptr() % 16 and not any(stride % 16 or stride < 1 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # a contiguous one may begin at an odd place
