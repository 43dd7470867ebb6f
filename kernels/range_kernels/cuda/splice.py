"""Splice on a GPU: one block a token, whose threads copy rows in pieces of 16 bytes, or in words where they must.

token -> range of the plan that holds it? (search by the warp) -> item row : table row of its id -> copy, or cast and scale
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import cuda, int64, uint64

from ..splice import Clipped, cast, pack_rows
from .device import as_array, stream
from .kernel import Kernel, Source
from .ptx import SIMULATED, convert_16_bytes, copy_4_times_16_bytes, copy_16_bytes, fill_16_bytes, load_long, types

_THREADS = 128
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # of rows that are cast; 0 is a copy
_NUMBERS = 5  # of an entry of the plan: start, stop, address, bytes from row to row, kind


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
    entry_bytes, size = 8 * _NUMBERS, 4 if dtype == "float32" else 2
    from_float32, from_float16 = convert_16_bytes["float32", dtype], convert_16_bytes["float16", dtype]
    from_bfloat16, from_own = convert_16_bytes["bfloat16", dtype], convert_16_bytes[dtype, dtype]

    def copy_wide(input_ids, plan, ranges, table, vocab, row_bytes, out, scale):
        token, own = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x & 31)
        row = load_long(input_ids + uint64(8 * token))  # on its way during the search
        # How many ranges start at or before the token? A warp looks at 32 places at once: two rounds find one of 1,000 ranges.
        first, last, width = int64(0), ranges, int64(2)
        while width > 1 and first < last:
            width = (last - first + 31) >> 5
            probe = first + (own + 1) * width - 1
            before = probe < last and load_long(plan + uint64(entry_bytes * probe)) <= token
            first += cuda.popc(cuda.ballot_sync(0xFFFFFFFF, before)) * width
            last = min(first + width - 1, last)
        known, inside, source, kind = 0 <= row < vocab, False, table + uint64(row) * row_bytes, int64(0)
        if first > 0:
            entry = plan + uint64(entry_bytes * (first - 1))
            start, stop = load_long(entry), load_long(entry + uint64(8))
            address, stride = load_long(entry + uint64(16)), load_long(entry + uint64(24))
            if token < stop:
                known, inside, source = True, True, uint64(address) + uint64(token - start) * uint64(stride)
                kind = load_long(entry + uint64(32))
        target = out + uint64(token) * row_bytes
        place, step = uint64(cuda.threadIdx.x * 16), uint64(cuda.blockDim.x * 16)
        if not known:
            while place < row_bytes:
                fill_16_bytes(target + place)
                place += step
        elif converts and inside and kind != 0:
            while place < row_bytes:
                if kind == 1:
                    from_float32(target + place, source + place * uint64(4) // uint64(size), np.float32(1.0))
                elif kind == 2:
                    from_float16(target + place, source + place * uint64(2) // uint64(size), np.float32(1.0))
                else:
                    from_bfloat16(target + place, source + place * uint64(2) // uint64(size), np.float32(1.0))
                place += step
        elif converts and not inside and scale != np.float32(1.0):
            while place < row_bytes:
                from_own(target + place, source + place, scale)
                place += step
        else:
            while place + uint64(3) * step < row_bytes:
                copy_4_times_16_bytes(target + place, source + place, step)
                place += uint64(4) * step
            while place < row_bytes:
                copy_16_bytes(target + place, source + place, step)
                place += step

    return copy_wide


def source(dtype: str, converts: bool) -> Source:
    """What the kernel is made from."""
    number, unsigned = types.int64, types.uint64
    kinds = types.void(unsigned, unsigned, number, unsigned, number, unsigned, unsigned, types.float32)
    return Source(f"splice {dtype} converts={converts}", partial(make_kernel, dtype, converts), kinds, 256)


@cache
def compiled(dtype: str, converts: bool, device: int) -> Kernel:
    """The kernel on a device."""
    return Kernel(source(dtype, converts), device)


class DevicePlan:
    """Where each range's rows lie, on the device: int64 `[ranges, 5]`, start, stop, address, bytes from row to row, kind.

    `rows` are kept alive; `wide` says whether they all lie in pieces of 16 bytes.
    """

    def __init__(self, clipped: Clipped, table: torch.Tensor) -> None:
        self.rows = [rows if rows.dtype in DTYPES else rows.to(table.dtype) for _, _, rows in clipped]
        self.rows = [rows if rows.stride(1) == 1 else rows.contiguous() for rows in self.rows]
        lies = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in self.rows]
        kinds = [0 if rows.dtype is table.dtype else _KINDS[rows.dtype] for rows in self.rows]
        self.wide = not any(number % 16 for number in sum(lies, ()))
        self.converts = any(kinds)
        entries = [(start, stop, *lie, kind) for (start, stop, _), lie, kind in zip(clipped, lies, kinds, strict=True)]
        plan = torch.from_numpy(np.array(entries, dtype=np.int64).reshape(-1, _NUMBERS))
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
            threads = min(256, max(32, -(-pieces // 4 // 32) * 32))
            kernel.launch(
                (len(input_ids), 1), table, input_ids.data_ptr(), plan.entries.data_ptr(), len(plan.entries),
                table.data_ptr(), table.shape[0], row_bytes, out.data_ptr(), scale, threads=threads,
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
