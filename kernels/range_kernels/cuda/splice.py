"""Splice on a GPU: one block a token, its threads copy the row in pieces of 16 bytes, or in words where it must be.

token -> range of the plan that holds it? (bisection) -> packed row : table row of its id -> copy
"""

from __future__ import annotations

import numpy as np
import torch
from numba import cuda, int64, uint64

from ..splice import Clipped, pack_rows
from .device import as_array, stream
from .ptx import SIMULATED, copy_4_times_16_bytes, copy_16_bytes, fill_16_bytes, load_long

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
def _copy_wide(input_ids, plan, ranges, tokens, a_block, table, vocab, row_bytes, out):
    """The same in 16-byte pieces, from where the items lie; a block copies `a_block` tokens, so that one search serves several.

    All but the counts are addresses: int64 ids, int64 `[ranges, 4]` start, stop, address, bytes from row to row.
    """
    input_ids, plan, table, out = uint64(input_ids), uint64(plan), uint64(table), uint64(out)
    begin = int64(cuda.blockIdx.x) * a_block
    first, last = int64(0), ranges
    while first < last:
        middle = (first + last) // 2
        if load_long(plan + uint64(32 * middle)) <= begin:
            first = middle + 1
        else:
            last = middle
    number = first - 1  # the last range that starts at or before the token
    start, stop, address, stride, following = int64(0), int64(0), int64(0), int64(0), int64(1) << 62
    if number >= 0:
        entry = plan + uint64(32 * number)
        start, stop = load_long(entry), load_long(entry + uint64(8))
        address, stride = load_long(entry + uint64(16)), load_long(entry + uint64(24))
    if number + 1 < ranges:
        following = load_long(plan + uint64(32 * (number + 1)))
    lane, step = uint64(cuda.threadIdx.x * 16), uint64(cuda.blockDim.x * 16)
    for token in range(begin, min(begin + a_block, tokens)):
        if token == following:
            number += 1
            entry = plan + uint64(32 * number)
            start, stop = token, load_long(entry + uint64(8))
            address, stride = load_long(entry + uint64(16)), load_long(entry + uint64(24))
            following = load_long(entry + uint64(32)) if number + 1 < ranges else int64(1) << 62
        known = True
        if token < stop:
            source = uint64(address) + uint64(token - start) * uint64(stride)
        else:
            row = load_long(input_ids + uint64(8 * token))
            known = 0 <= row < vocab
            source = table + uint64(row) * row_bytes
        target = out + uint64(token) * row_bytes
        place = lane
        if known:
            while place + uint64(3) * step < row_bytes:
                copy_4_times_16_bytes(target + place, source + place, step)
                place += uint64(4) * step
            while place < row_bytes:
                copy_16_bytes(target + place, source + place, step)
                place += step
        else:
            while place < row_bytes:
                fill_16_bytes(target + place)
                place += step


def launch(input_ids: torch.Tensor, table: torch.Tensor, clipped: Clipped, out: torch.Tensor, scale: float) -> None:
    """See `range_kernels.splice`; fills `out` in one launch without waiting for the device, so ids are not checked."""
    row_bytes = table.shape[1] * table.element_size()
    size = table.element_size()
    rows = [rows if rows.stride(1) == 1 else rows.contiguous() for _, _, rows in clipped]
    lies = [(x.data_ptr(), x.stride(0) * size) for x in rows]
    wide = not any(number % 16 for number in (row_bytes, table.data_ptr(), out.data_ptr(), *sum(lies, ())))
    if SIMULATED or not wide:
        _launch_words(input_ids, table, *pack_rows(clipped, table), out)
    else:
        entries = [(start, stop, *lie) for (start, stop, _), lie in zip(clipped, lies, strict=True)]
        plan = np.array(entries, dtype=np.int64).reshape(-1, 4)
        device_plan = torch.from_numpy(plan).to(table.device, non_blocking=True)
        pieces, tokens = row_bytes // 16, len(input_ids)
        threads = min(256, max(32, -(-pieces // 4 // 32) * 32))
        a_block = 8 if tokens >= 16384 else 2 if tokens >= 4096 else 1
        _copy_wide[-(-tokens // a_block), threads, stream(table)](
            input_ids.data_ptr(), device_plan.data_ptr(), len(plan), tokens, a_block, table.data_ptr(), table.shape[0],
            uint64(row_bytes), out.data_ptr(),
        )  # fmt: skip
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
