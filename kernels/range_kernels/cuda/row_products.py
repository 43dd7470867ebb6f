"""Products of one or two rows with a weight matrix: each warp reads one row of weights, four times sixteen bytes per lane and iteration.

A decode step of few requests reads every weight once for little arithmetic, so what counts is how many bytes are under way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from numba import cuda, float32, int32, uint64

from .compiled_kernel import Kernel, Source
from .layer_ops import DTYPES
from .ptx import types
from .vectors import load_eight, load_one, store_one, warp_sum

MOST_ROWS = 2
_WARPS = 8


@cache
def make_row_product(dtype: str, rows: int) -> Callable[..., None]:
    """The kernel for one or two rows of float16 or bfloat16; sums run in float32, in an order that depends on the width only."""
    load, read, store = load_eight[dtype], load_one[dtype], store_one[dtype]

    @cuda.jit(device=True, inline=True)
    def dot(a, b):
        low = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
        return low + (a[4] * b[4] + a[5] * b[5] + a[6] * b[6] + a[7] * b[7])

    def row_product(x, weight, bias, out, chunks, outputs):
        """`out` `[rows, outputs]` = `x` `[rows, 8 * chunks]` times `weight` `[outputs, 8 * chunks]`, plus `bias` if it is not 0."""
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        column = int32(cuda.blockIdx.x * _WARPS + warp)
        if column >= outputs:
            return
        row, piece = uint64(chunks) * uint64(16), uint64(512)
        one = weight + uint64(column) * row
        a0, a1 = float32(0.0), float32(0.0)
        chunk = lane
        while chunk + 96 < chunks:
            at = uint64(chunk) * uint64(16)
            w, y, v, z = (
                load(one + at),
                load(one + at + piece),
                load(one + at + piece + piece),
                load(one + at + piece + piece + piece),
            )
            a0 += dot(w, load(x + at)) + dot(y, load(x + at + piece))
            a0 += dot(v, load(x + at + piece + piece)) + dot(z, load(x + at + piece + piece + piece))
            if rows > 1:
                at += row
                a1 += dot(w, load(x + at)) + dot(y, load(x + at + piece))
                a1 += dot(v, load(x + at + piece + piece)) + dot(z, load(x + at + piece + piece + piece))
            chunk += int32(128)
        while chunk < chunks:
            at = uint64(chunk) * uint64(16)
            w = load(one + at)
            a0 += dot(w, load(x + at))
            if rows > 1:
                a1 += dot(w, load(x + row + at))
            chunk += int32(32)
        a0 = warp_sum(a0)
        if rows > 1:
            a1 = warp_sum(a1)
        if lane < rows:
            value = a1 if lane == 1 else a0
            if bias != uint64(0):
                value += read(bias + uint64(column) * uint64(2))
            store(out + (uint64(lane) * uint64(outputs) + uint64(column)) * uint64(2), value)

    return row_product


_A, _I = types.uint64, types.int32


def row_product_source(dtype: str, rows: int) -> Source:
    """The `Source` of `make_row_product`'s kernel."""
    signature = types.void(_A, _A, _A, _A, _I, _I)
    return Source(f"row product {dtype} {rows}", partial(make_row_product, dtype, rows), signature, 32 * _WARPS)


@cache
def _kernel(dtype: str, rows: int, device: int) -> Kernel:
    return Kernel(row_product_source(dtype, rows), device)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out` `[rows, outputs]` = `x` `[rows, inputs]` times `weight` `[outputs, inputs]`, plus `bias`: float16 or bfloat16, contiguous.

    `inputs` is a multiple of 8 and rows begin at multiples of 16 bytes; 1 to `MOST_ROWS` rows.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    kernel = _kernel(DTYPES[x.dtype], rows, x.device.index or 0)
    address = 0 if bias is None else bias.data_ptr()
    kernel.launch(
        (-(-outputs // _WARPS), 1), x, x.data_ptr(), weight.data_ptr(), address, out.data_ptr(), inputs // 8, outputs
    )
