"""Splice on a GPU: one block a token, its threads copy the row in pieces of 16 bytes, or in words where it must be.

token -> range of the plan that holds it? (bisection) -> packed row : table row of its id -> copy
"""

from __future__ import annotations

import numpy as np
import torch
from numba import cuda, int64, uint64

from ..splice import Clipped, pack_rows
from .device import as_array, stream
from .ptx import SIMULATED, copy_16_bytes, fill_16_bytes

_THREADS = 128


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


@cuda.jit
def _copy_wide(input_ids, plan, table, vocab, row_bytes, out):
    """The same in 16-byte pieces, from where the items lie: `plan` int64 `[ranges, 4]` start, stop, address, bytes from row to
    row; `table` and `out` are addresses."""
    token = int64(cuda.blockIdx.x)
    first, last = 0, plan.shape[0]
    while first < last:
        middle = (first + last) // 2
        if plan[middle, 0] <= token:
            first = middle + 1
        else:
            last = middle
    row = input_ids[token]
    source = table + uint64(row) * row_bytes
    known = 0 <= row < vocab
    if first > 0 and token < plan[first - 1, 1]:
        source = uint64(plan[first - 1, 2]) + uint64(token - plan[first - 1, 0]) * uint64(plan[first - 1, 3])
        known = True
    target = out + uint64(token) * row_bytes
    place, step = uint64(cuda.threadIdx.x * 16), uint64(cuda.blockDim.x * 16)
    while place < row_bytes:
        if known:
            copy_16_bytes(target + place, source + place)
        else:
            fill_16_bytes(target + place)
        place += step


def launch(input_ids: torch.Tensor, table: torch.Tensor, clipped: Clipped, out: torch.Tensor, scale: float) -> None:
    """See `range_kernels.splice`; fills `out` in one launch without waiting for the device, so ids are not checked."""
    row_bytes = table.shape[1] * table.element_size()
    rows = [rows if rows.stride(1) == 1 else rows.contiguous() for _, _, rows in clipped]
    strides = [x.stride(0) * x.element_size() for x in rows]
    wide = not any(number % 16 for number in (row_bytes, *strides, *(x.data_ptr() for x in (table, out, *rows))))
    if SIMULATED or not wide:
        _launch_words(input_ids, table, *pack_rows(clipped, table), out)
    else:
        plan = np.array(
            [
                (start, stop, x.data_ptr(), stride)
                for (start, stop, _), x, stride in zip(clipped, rows, strides, strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 4)
        device_plan = torch.from_numpy(plan).to(table.device, non_blocking=True)
        threads = min(256, max(32, -(-row_bytes // 16 // 32) * 32))
        _copy_wide[len(input_ids), threads, stream(table)](
            as_array(input_ids),
            as_array(device_plan),
            table.data_ptr(),
            table.shape[0],
            uint64(row_bytes),
            out.data_ptr(),
        )
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
