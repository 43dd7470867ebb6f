"""TMA loads on Hopper: the hardware copies a tile of rows to shared memory as boxes of a tensor described by a tensor map.

A tensor map describes the layout of a tensor. The host encodes templates, which depend only on strides and box sizes
and stay on the device permanently; each block of a kernel copies them and sets the addresses and lengths of its call.
So maps are encoded once per layout, and a captured CUDA graph needs no work on the host: its kernels build their maps
from their own arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda, int32, uint32, uint64

from .cp_async import LINE
from .ptx import load_int, page_row_of, store_int
from .ptx_sm90 import barrier_arrive, barrier_expect, set_map_address, set_map_rows, tma_load_3d

MAP = 128  # bytes
CHANNELS = LINE // 2  # per box: a row of a box is a line of shared memory, its 16-byte chunks swizzled


def templates(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """Return tensor map templates, `MAP` bytes for each tensor, in one tensor on their device; cached by layout.

    Args:
        tensors: 16-bit, `[tokens, heads, head_dim]`.
        rows: rows of one head that a load of `tensors[i]` copies; a box has `rows[i]` rows of `CHANNELS` channels.

    Raises:
        RuntimeError: the driver rejects a layout.
    """
    shapes = tuple((x.shape[1], x.shape[2], *_strides(x)) for x in tensors)
    return _templates(tensors[0].dtype, shapes, tuple(rows), tensors[0].device)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Return the strides between tokens and between heads; with a single token or head, PyTorch's stride may be any number."""
    tokens, heads, head_dim = x.shape
    return x.stride(0) if tokens > 1 else heads * head_dim, x.stride(1) if heads > 1 else head_dim


@cache
def _templates(
    dtype: torch.dtype, shapes: Sequence[tuple[int, int, int, int]], rows: Sequence[int], device: torch.device
) -> torch.Tensor:
    maps = np.array([_encode(dtype, *shape, count) for shape, count in zip(shapes, rows, strict=True)], np.uint64)
    return torch.from_numpy(maps.view(np.int64)).to(device)


def _encode(dtype: torch.dtype, heads: int, head_dim: int, token_stride: int, head_stride: int, rows: int) -> list[int]:
    from cuda.bindings import driver

    size, long, short = dtype.itemsize, driver.cuuint64_t, driver.cuuint32_t
    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype is torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    strides = [head_stride * size, token_stride * size]
    status, tensor_map = driver.cuTensorMapEncodeTiled(
        kind, 3, MAP,  # a dummy address: the kernel sets the tensor's
        [long(head_dim), long(heads), long(rows)], [long(stride) for stride in strides],
        [short(CHANNELS), short(1), short(rows)], [short(1)] * 3,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(status):
        shape = f"{heads} heads of {head_dim}, strides {token_stride} and {head_stride}, boxes of {rows} rows"
        raise RuntimeError(
            f"the driver rejected a tensor map of {dtype}, {shape}: {status.name}; copy the tensor (.contiguous()), or use "
            "path='tensor-core', which needs no tensor map"
        )
    return [int(word) for word in tensor_map.opaque]


@cuda.jit(device=True, inline="always")
def copy_maps(maps, templates, count, thread):
    """Copy `count` tensor maps between global addresses; the first `32 * count` threads copy 4 bytes each.

    All threads of the block may call it. The caller must synchronise them before a map is used.
    """
    if thread < 32 * count:
        offset = uint64(4 * thread)
        store_int(maps + offset, load_int(templates + offset))


@cuda.jit(device=True, inline="always")
def set_map(map, address, rows):
    """Set address and row count of the tensor of the map at global address `map`; call it from exactly one thread.

    The change must be released and acquired (`map_release`, `map_acquire`) before TMA uses the map.
    """
    set_map_address(map, address)
    set_map_rows(map, rows)


def make_tma_load(head_dim: int, rows: int, paged: bool) -> Any:
    """Return the device function with which a warpgroup loads a tile of `rows` rows of one head by TMA.

    All 128 threads call it and arrive at the mbarrier; a few of them issue the loads. If `paged`, one load copies the
    rows of one page that fit in the tile, the smaller of `1 << shift` and `rows`. Channels past the head, in the last box, become zeros.
    """
    blocks = -(-head_dim // CHANNELS)
    size = 2 * blocks * CHANNELS * rows
    max_shift = rows.bit_length() - 1  # if paged, `rows` is a power of two

    @cuda.jit(device=True, inline="always")
    def load(target, map, head, first, barrier, thread, pages, shift):
        """Load `rows` rows from row `first` on to shared memory at `target`.

        map: global address of the tensor map. barrier: address of the mbarrier, whose phase then also waits for the
            bytes.
        pages, shift: only if paged; address of the sequence's page numbers, and `1 << shift` rows per page.
        """
        if thread == 0:
            barrier_expect(barrier, uint32(size))
        else:
            barrier_arrive(barrier)
        if paged:
            step = min(shift, int32(max_shift))
            if thread < rows >> step:
                row = int32(thread << step)
                source_row = page_row_of(pages, shift, int32(first + row))
                for block in range(blocks):
                    at = target + uint32(block * rows * LINE) + uint32(row * LINE)
                    tma_load_3d(at, map, int32(block * CHANNELS), head, source_row, barrier)
        elif thread == 0:
            for block in range(blocks):
                tma_load_3d(target + uint32(block * rows * LINE), map, int32(block * CHANNELS), head, first, barrier)

    return load
