"""Splice on a GPU: a block copies a token's row, or a part of it, in 16-byte chunks, or in words if rows are not aligned.

token -> is it in a range of the plan? (search by the warp) -> item row, or table row of its id -> copy, or cast and scale
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, int32, int64, uint32, uint64

from ..clipping import Clipped, cast, pack_rows
from .compiled_kernel import Kernel, Source
from .device import as_array, stream
from .ptx import (
    SIMULATED,
    convert_16_bytes,
    copy_2_times_16_bytes,
    copy_16_bytes,
    fill_16_bytes,
    load_int,
    load_long,
    types,
)

_THREADS = 128
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # kind of a row that is cast; 0 is a plain copy
# An entry of the plan; `stride`: bytes between rows.
_FIELDS = [("start", "i4"), ("stop", "i4"), ("kind", "i4"), ("address", "i8"), ("stride", "i8")]
_ENTRY = np.dtype(_FIELDS, align=True)


@cuda.jit
def _copy_rows(input_ids, plan, table, rows, out):
    """The splice kernel for unaligned rows: one block per token copies a row word by word.

    `table`, `rows` and `out` are integer words `[n, words]`; `plan` is that of `clipping.pack_rows`. A token whose id
    is outside the table gets all bits set, which is NaN.
    """
    token = cuda.blockIdx.x
    first, last = 0, plan.shape[0]  # the range that contains the token, if any, is the last that starts at or before it
    while first < last:
        middle = (first + last) // 2
        if plan[middle, 0] <= token:
            first = middle + 1
        else:
            last = middle
    source = -1
    if first > 0 and token < plan[first - 1, 1]:
        source = plan[first - 1, 2] + token - plan[first - 1, 0]
    row = input_ids[token]
    for word in range(cuda.threadIdx.x, out.shape[1], cuda.blockDim.x):
        if source >= 0:
            out[token, word] = rows[source, word]
        elif 0 <= row < table.shape[0]:
            out[token, word] = table[row, word]
        else:
            out[token, word] = -1


@cache
def make_kernel(dtype: str, converts: bool):
    """Return the Python function of the kernel for aligned rows and a table of `dtype`, which `Source` compiles.

    `converts`: whether it also casts items of other dtypes and multiplies table rows by a scale.
    """
    entry_bytes, size = uint64(_ENTRY.itemsize), 4 if dtype == "float32" else 2
    from_float32, from_float16 = convert_16_bytes["float32", dtype], convert_16_bytes["float16", dtype]
    from_bfloat16, from_own = convert_16_bytes["bfloat16", dtype], convert_16_bytes[dtype, dtype]

    def copy_wide(input_ids, plan, ranges, table, vocab, row_bytes, out, scale, shift):
        """Copy one of the `1 << shift` parts of a token's row per block, two 16-byte chunks per thread."""
        block, lane = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x & 31)
        token = int32(block >> shift)
        row = load_long(input_ids + uint64(8) * uint64(token))  # in flight during the search
        # The last range that starts at or before the token is in [first, last). A warp compares 32 starts at once.
        first, last = int32(0), ranges
        while last - first > 32:
            width = int32((last - first + 31) >> 5)
            probe = int32(first + lane * width)
            starts_before = probe < last and load_int(plan + entry_bytes * uint64(probe)) <= token
            first = int32(first + max(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, starts_before)) - 1, 0) * width)
            last = min(int32(first + width), last)
        # Then each lane loads one whole entry: the address and stride arrive together with the bounds, not after them.
        start, stop, address, stride, kind = int32(0), int32(0), uint64(0), uint64(0), int32(0)
        if first + lane < last:
            entry = plan + entry_bytes * uint64(int32(first + lane))
            start, stop, kind = load_int(entry), load_int(entry + uint64(4)), load_int(entry + uint64(8))
            address, stride = uint64(load_long(entry + uint64(16))), uint64(load_long(entry + uint64(24)))
        starts_before = first + lane < last and start <= token
        owner = int32(max(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, starts_before)) - 1, 0))
        inside = cuda.shfl_sync(0xFFFFFFFF, int32(starts_before and token < stop), owner) != 0
        source = uint64(cuda.shfl_sync(0xFFFFFFFF, int64(address + uint64(int32(token - start)) * stride), owner))
        kind = cuda.shfl_sync(0xFFFFFFFF, kind, owner)
        known = inside or 0 <= row < vocab
        if not inside:
            source = table + uint64(row) * uint64(row_bytes)
        target = out + uint64(token) * uint64(row_bytes)
        step = uint32(cuda.blockDim.x * 16)
        begin = uint32(2 * step * uint32(block - (token << shift)))
        end = min(uint32(begin + 2 * step), row_bytes)
        offset = uint32(begin + uint32(cuda.threadIdx.x * 16))
        if not known:
            while offset < end:
                fill_16_bytes(target + uint64(offset))
                offset = uint32(offset + step)
        elif converts and inside and kind != 0:
            while offset < end:
                into, wide, narrow = target + uint64(offset), uint64(offset) * uint64(4), uint64(offset) * uint64(2)
                if kind == 1:
                    from_float32(into, source + wide // uint64(size), np.float32(1.0))
                elif kind == 2:
                    from_float16(into, source + narrow // uint64(size), np.float32(1.0))
                else:
                    from_bfloat16(into, source + narrow // uint64(size), np.float32(1.0))
                offset = uint32(offset + step)
        elif converts and not inside and scale != np.float32(1.0):
            while offset < end:
                from_own(target + uint64(offset), source + uint64(offset), scale)
                offset = uint32(offset + step)
        elif offset + step < end:
            copy_2_times_16_bytes(target + uint64(offset), source + uint64(offset), uint64(step))
        elif offset < end:
            copy_16_bytes(target + uint64(offset), source + uint64(offset), uint64(step))

    return copy_wide


def source(dtype: str, converts: bool) -> Source:
    """Return the `Source` of the kernel for a table of `dtype`; `converts`: whether an item has another dtype, so that its rows are cast."""
    address, number = types.uint64, types.int32
    kinds = types.void(
        address, address, number, address, types.int64, types.uint32, address, types.float32, number
    )  # fmt: skip
    return Source(f"splice {dtype} converts={converts}", partial(make_kernel, dtype, converts), kinds, _THREADS)


@cache
def compiled(dtype: str, converts: bool, device: int) -> Kernel:
    """Return the kernel for a device, compiled now (seconds) if it is neither in memory nor on disk."""
    return Kernel(source(dtype, converts), device)


class DevicePlan:
    """The addresses of all item rows, on the device.

    Attributes:
        entries: uint8, one `_ENTRY` per range: start, stop, kind of conversion, address of its rows, bytes between
            rows.
        rows: the tensors at those addresses, kept alive by this object.
        wide: whether all rows are aligned to 16 bytes.
        converts: whether an item has another dtype than the table.
    """

    def __init__(self, clipped: Clipped, table: torch.Tensor) -> None:
        self.rows = [rows if rows.dtype in DTYPES else rows.to(table.dtype) for _, _, rows in clipped]
        self.rows = [rows if rows.stride(1) == 1 else rows.contiguous() for rows in self.rows]
        locations = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in self.rows]
        kinds = [0 if rows.dtype is table.dtype else _KINDS[rows.dtype] for rows in self.rows]
        self.wide = not any(number % 16 for number in sum(locations, ()))
        self.converts = any(kinds)
        entries = [
            (start, stop, kind, *location)
            for (start, stop, _), location, kind in zip(clipped, locations, kinds, strict=True)
        ]
        plan = torch.from_numpy(np.array(entries, _ENTRY).view(np.uint8))
        self.entries = plan.to(table.device, non_blocking=True)


def prepare(clipped: Clipped, table: torch.Tensor) -> tuple[DevicePlan, bool]:
    """Return a plan, and True if `launch` needs only one kernel: table and items are aligned to 16 bytes, and it is a real GPU.

    If True, the kernels are compiled here, and the current stream is waited for, so that the plan can be used on every
    stream.
    """
    plan = DevicePlan(clipped, table)
    whole = plan.wide and not table.shape[1] * table.element_size() % 16 and not table.data_ptr() % 16
    if whole and not SIMULATED:
        for converts in {True, plan.converts}:  # with a scale, and without one
            compiled(DTYPES[table.dtype], converts, table.device.index or 0)
        torch.cuda.current_stream(table.device).synchronize()
    return plan, whole and not SIMULATED


def launch(
    input_ids: torch.Tensor, table: torch.Tensor, clipped: Clipped, out: torch.Tensor, scale: float, plan: Any = None
) -> None:
    """Launch `range_kernels.splice` into `out` on the current stream, without waiting for it, so ids are not checked.

    `plan`: the `DevicePlan` of `clipped`, built here if None. Aligned rows take one kernel launch; others are copied
    word by word.
    """
    row_bytes = table.shape[1] * table.element_size()
    if not SIMULATED and not any(number % 16 for number in (row_bytes, table.data_ptr(), out.data_ptr())):
        plan = DevicePlan(clipped, table) if plan is None else plan
        if plan.wide:
            converts = plan.converts or scale != 1.0
            kernel = compiled(DTYPES[table.dtype], converts, table.device.index or 0)
            chunks = row_bytes // 16
            shift = (-(-chunks // (2 * _THREADS)) - 1).bit_length()
            threads = -(-chunks // (64 << shift)) * 32  # whole warps, two chunks per thread
            kernel.launch(
                (len(input_ids) << shift, 1), table, input_ids.data_ptr(), plan.entries.data_ptr(), len(plan.rows),
                table.data_ptr(), table.shape[0], row_bytes, out.data_ptr(), scale, shift, threads=threads,
            )  # fmt: skip
            return
    _launch_words(input_ids, table, *pack_rows(cast(clipped, table), table), out)
    if scale != 1.0:
        looked_up = torch.ones(len(input_ids), 1, dtype=torch.bool)
        for start, stop, _ in clipped:
            looked_up[start:stop] = False
        out.copy_(torch.where(looked_up.to(table.device), out * scale, out))


def _launch_words(
    input_ids: torch.Tensor, table: torch.Tensor, plan: np.ndarray, rows: torch.Tensor, out: torch.Tensor
) -> None:
    """Launch the kernel for rows that are not aligned to 16 bytes, and for the simulator."""
    row_bytes = table.shape[1] * table.element_size()
    starts = [x.storage_offset() * x.element_size() for x in (table, rows, out)]  # a view may begin between words
    word = next(kind for size, kind in _WORDS if not any(number % size for number in (row_bytes, *starts)))
    device_plan = torch.from_numpy(plan).to(table.device, non_blocking=True)
    arrays = [as_array(x.detach().view(word)) for x in (table, rows, out)]
    _copy_rows[len(input_ids), _THREADS, stream(table)](as_array(input_ids), as_array(device_plan), *arrays)


_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
