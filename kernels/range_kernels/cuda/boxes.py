"""Boxes of a tensor: what the copying unit of Hopper (TMA) brings into shared memory by itself, a tile of rows at a time.

A tensor map says how a tensor lies. The host makes templates, which depend on strides and sizes of boxes alone and are kept on the
device for good; each block of a kernel copies them and puts addresses and lengths of this call in. So maps are encoded once for
each way that tensors lie, and a captured graph works on whatever its kernels are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda, int32, uint32, uint64

from .fetch import LINE
from .ptx import load_int, page_row_of, store_int
from .ptx_hopper import barrier_arrive, barrier_expect, bring_box, set_map_address, set_map_rows

MAP = 128  # bytes
CHANNELS = LINE // 2  # of a box: a row of it is a line of shared memory, its 16-byte pieces swizzled


def templates(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """Tensor maps of `[tokens, heads, head_dim]` tensors of 16-bit floats, in boxes of so many rows of one head; on the device."""
    shapes = tuple((x.shape[1], x.shape[2], *_strides(x)) for x in tensors)
    return _templates(tensors[0].dtype, shapes, tuple(rows), tensors[0].device)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """From token to token and from head to head; of a single one, the stride to the next may be any number."""
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
    status, made = driver.cuTensorMapEncodeTiled(
        kind, 3, MAP,  # an address of no meaning: the kernel knows the tensor's
        [long(head_dim), long(heads), long(rows)], [long(stride) for stride in strides],
        [short(CHANNELS), short(1), short(rows)], [short(1)] * 3,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(status):
        shape = f"{heads} heads of {head_dim}, strides {token_stride} and {head_stride}, boxes of {rows} rows"
        raise RuntimeError(
            f"the driver makes no tensor map of {dtype}, {shape}: {status.name}; copy the tensor (.contiguous()), or name "
            "path='tensor-core', which needs no map"
        )
    return [int(word) for word in made.opaque]


@cuda.jit(device=True, inline="always")
def copy_maps(maps, templates, count, thread):
    """Each of `32 * count` threads copies a word of `count` maps; then they must meet."""
    if thread < 32 * count:
        place = uint64(4 * thread)
        store_int(maps + place, load_int(templates + place))


@cuda.jit(device=True, inline="always")
def aim_map(map, address, rows):
    """One thread puts in where the tensor lies and how many rows it has."""
    set_map_address(map, address)
    set_map_rows(map, rows)


def make_bring(head_dim: int, rows: int, paged: bool) -> Any:
    """The device function with which the 128 threads of a warpgroup bring `rows` whole rows of one head: all arrive, few copy.

    Where paged, a box holds as many rows of a page as a tile wants: `1 << shift` or `rows`.
    """
    blocks, size = head_dim // CHANNELS, 2 * head_dim * rows
    most = rows.bit_length() - 1  # the rows are a power of two where they are paged

    @cuda.jit(device=True, inline="always")
    def bring(target, map, head, first, here, thread, pages, shift):
        """To shared memory from row `first` on; `here` is the barrier to arrive at."""
        if thread == 0:
            barrier_expect(here, uint32(size))
        else:
            barrier_arrive(here)
        if paged:
            step = min(shift, int32(most))
            if thread < rows >> step:
                row = int32(thread << step)
                place = page_row_of(pages, shift, int32(first + row))
                for block in range(blocks):
                    at = target + uint32(block * rows * LINE) + uint32(row * LINE)
                    bring_box(at, map, int32(block * CHANNELS), head, place, here)
        elif thread == 0:
            for block in range(blocks):
                bring_box(target + uint32(block * rows * LINE), map, int32(block * CHANNELS), head, first, here)

    return bring
