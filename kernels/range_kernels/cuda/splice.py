"""Splice on a GPU, plain Numba: one block a token, its threads copy the row in words.

token -> range of the plan that holds it? (bisection) -> packed row : table row of its id -> copy
"""

from __future__ import annotations

import numpy as np
import torch
from numba import cuda

from .device import as_array, stream

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


def launch(
    input_ids: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, plan: np.ndarray, out: torch.Tensor, scale: float
) -> None:
    """See `range_kernels.splice`; fills `out` in one launch without waiting for the device, so ids are not checked."""
    row_bytes = table.shape[1] * table.element_size()
    starts = [x.storage_offset() * x.element_size() for x in (table, rows, out)]  # a view may begin between words
    word = next(kind for size, kind in _WORDS if not any(number % size for number in (row_bytes, *starts)))
    device_plan = torch.from_numpy(plan).to(table.device, non_blocking=True)
    arrays = [as_array(x.detach().view(word)) for x in (table, rows, out)]
    _copy_rows[len(input_ids), _THREADS, stream(table)](as_array(input_ids), as_array(device_plan), *arrays)
    if scale != 1.0:
        looked_up = torch.ones(len(input_ids), 1, dtype=torch.bool)
        for start, stop, _ in plan:
            looked_up[start:stop] = False
        out.copy_(torch.where(looked_up.to(table.device), out * scale, out))


_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))
