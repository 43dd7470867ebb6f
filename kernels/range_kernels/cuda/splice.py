"""Splice on a GPU: blocks copy a token's row, or a part of it, in pieces of 16 bytes, or in words where they must.

token -> range of the plan that holds it? (search by the warp) -> item row : table row of its id -> copy, or cast and scale
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, int32, int64, uint32, uint64

from ..splice import Clipped, cast, pack_rows
from .device import as_array, stream
from .kernel import Kernel, Source
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
_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # of rows that are cast; 0 is a copy
# An entry of the plan; `stride`: bytes from row to row.
_FIELDS = [("start", "i4"), ("stop", "i4"), ("kind", "i4"), ("address", "i8"), ("stride", "i8")]
_ENTRY = np.dtype(_FIELDS, align=True)


@cuda.jit
def _copy_rows(input_ids, plan, table, rows, out):
    """All rows are integer words `[n, words]`. A token whose id is outside the table gets all bits set, which is NaN."""
    token = cuda.blockIdx.x
    first, last = 0, plan.shape[0]  # the range that holds the token, if any, is the last that starts at or before it
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
    """The kernel for a table of a dtype; `converts`: where items of other dtypes, or a scale on table rows, may come."""
    entry_bytes, size = uint64(_ENTRY.itemsize), 4 if dtype == "float32" else 2
    from_float32, from_float16 = convert_16_bytes["float32", dtype], convert_16_bytes["float16", dtype]
    from_bfloat16, from_own = convert_16_bytes["bfloat16", dtype], convert_16_bytes[dtype, dtype]

    def copy_wide(input_ids, plan, ranges, table, vocab, row_bytes, out, scale, shift):
        """A block copies one of `1 << shift` parts of a token's row, two pieces a thread."""
        block, own = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x & 31)
        token = int32(block >> shift)
        row = load_long(input_ids + uint64(8) * uint64(token))  # on its way during the search
        # The last range that starts at or before the token is in [first, last). A warp looks at 32 starts at once.
        first, last = int32(0), ranges
        while last - first > 32:
            width = int32((last - first + 31) >> 5)
            probe = int32(first + own * width)
            before = probe < last and load_int(plan + entry_bytes * uint64(probe)) <= token
            first = int32(first + max(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, before)) - 1, 0) * width)
            last = min(int32(first + width), last)
        # Then each lane has one, all of it: what the token needs is asked for with its place, not after.
        start, stop, address, stride, kind = int32(0), int32(0), uint64(0), uint64(0), int32(0)
        if first + own < last:
            entry = plan + entry_bytes * uint64(int32(first + own))
            start, stop, kind = load_int(entry), load_int(entry + uint64(4)), load_int(entry + uint64(8))
            address, stride = uint64(load_long(entry + uint64(16))), uint64(load_long(entry + uint64(24)))
        before = first + own < last and start <= token
        holder = int32(max(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, before)) - 1, 0))
        inside = cuda.shfl_sync(0xFFFFFFFF, int32(before and token < stop), holder) != 0
        source = uint64(cuda.shfl_sync(0xFFFFFFFF, int64(address + uint64(int32(token - start)) * stride), holder))
        kind = cuda.shfl_sync(0xFFFFFFFF, kind, holder)
        known = inside or 0 <= row < vocab
        if not inside:
            source = table + uint64(row) * uint64(row_bytes)
        target = out + uint64(token) * uint64(row_bytes)
        step = uint32(cuda.blockDim.x * 16)
        begin = uint32(2 * step * uint32(block - (token << shift)))
        end = min(uint32(begin + 2 * step), row_bytes)
        place = uint32(begin + uint32(cuda.threadIdx.x * 16))
        if not known:
            while place < end:
                fill_16_bytes(target + uint64(place))
                place = uint32(place + step)
        elif converts and inside and kind != 0:
            while place < end:
                into, wide, narrow = target + uint64(place), uint64(place) * uint64(4), uint64(place) * uint64(2)
                if kind == 1:
                    from_float32(into, source + wide // uint64(size), np.float32(1.0))
                elif kind == 2:
                    from_float16(into, source + narrow // uint64(size), np.float32(1.0))
                else:
                    from_bfloat16(into, source + narrow // uint64(size), np.float32(1.0))
                place = uint32(place + step)
        elif converts and not inside and scale != np.float32(1.0):
            while place < end:
                from_own(target + uint64(place), source + uint64(place), scale)
                place = uint32(place + step)
        elif place + step < end:
            copy_2_times_16_bytes(target + uint64(place), source + uint64(place), uint64(step))
        elif place < end:
            copy_16_bytes(target + uint64(place), source + uint64(place), uint64(step))

    return copy_wide


def source(dtype: str, converts: bool) -> Source:
    """What the kernel is made from."""
    address, number = types.uint64, types.int32
    kinds = types.void(
        address, address, number, address, types.int64, types.uint32, address, types.float32, number
    )  # fmt: skip
    return Source(f"splice {dtype} converts={converts}", partial(make_kernel, dtype, converts), kinds, _THREADS)


@cache
def compiled(dtype: str, converts: bool, device: int) -> Kernel:
    """The kernel on a device."""
    return Kernel(source(dtype, converts), device)


class DevicePlan:
    """Where each range's rows lie, on the device: `entries`, bytes of `_ENTRY`, one a range.

    `rows` are kept alive; `wide` says whether they all lie in pieces of 16 bytes.
    """

    def __init__(self, clipped: Clipped, table: torch.Tensor) -> None:
        self.rows = [rows if rows.dtype in DTYPES else rows.to(table.dtype) for _, _, rows in clipped]
        self.rows = [rows if rows.stride(1) == 1 else rows.contiguous() for rows in self.rows]
        lies = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in self.rows]
        kinds = [0 if rows.dtype is table.dtype else _KINDS[rows.dtype] for rows in self.rows]
        self.wide = not any(number % 16 for number in sum(lies, ()))
        self.converts = any(kinds)
        entries = [(start, stop, kind, *lie) for (start, stop, _), lie, kind in zip(clipped, lies, kinds, strict=True)]
        plan = torch.from_numpy(np.array(entries, _ENTRY).view(np.uint8))
        self.entries = plan.to(table.device, non_blocking=True)


def prepare(clipped: Clipped, table: torch.Tensor) -> tuple[DevicePlan, bool]:
    """A plan that is on the device for every stream, its kernels compiled; and whether calls with it are one launch."""
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
    """See `range_kernels.splice`; fills `out` in one launch without waiting for the device, so ids are not checked.

    `plan`: a `DevicePlan` of the same items, made before; else it is made now.
    """
    row_bytes = table.shape[1] * table.element_size()
    if not SIMULATED and not any(number % 16 for number in (row_bytes, table.data_ptr(), out.data_ptr())):
        plan = DevicePlan(clipped, table) if plan is None else plan
        if plan.wide:
            converts = plan.converts or scale != 1.0
            kernel = compiled(DTYPES[table.dtype], converts, table.device.index or 0)
            pieces = row_bytes // 16
            shift = (-(-pieces // (2 * _THREADS)) - 1).bit_length()
            threads = -(-pieces // (64 << shift)) * 32  # whole warps, two pieces a thread
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
    """For rows that do not lie in pieces of 16 bytes, and for the simulator."""
    row_bytes = table.shape[1] * table.element_size()
    starts = [x.storage_offset() * x.element_size() for x in (table, rows, out)]  # a view may begin between words
    word = next(kind for size, kind in _WORDS if not any(number % size for number in (row_bytes, *starts)))
    device_plan = torch.from_numpy(plan).to(table.device, non_blocking=True)
    arrays = [as_array(x.detach().view(word)) for x in (table, rows, out)]
    _copy_rows[len(input_ids), _THREADS, stream(table)](as_array(input_ids), as_array(device_plan), *arrays)


_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
