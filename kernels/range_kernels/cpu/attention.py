"""Attention on the CPU over pages of keys and values in the kernel's own layout.

    a page    keys   [kv_heads, panels, head_dim, COLUMNS]        COLUMNS keys side by side, transposed
              values [kv_heads, head_panels, page_size, COLUMNS]  COLUMNS channels side by side
    a task    the queries of one KV head's group of heads, up to QUERIES rows; for each block of KEYS keys:
              S = Q K^T (panels that no row of the group sees are skipped) -> mask by key_start/key_stop -> exp2 -> O += P V

P V is added up in three levels, COLUMNS keys, KEYS keys, all blocks, so that its rounding error hardly grows with the number of
keys: with one long sum it was six times that of torch at 8,192 keys of nearly equal weight; now it is at most as large.

A token is written into its page once and read by every later step, so prefill chunks and decode steps never repack
earlier keys. A row's interval `[key_start, key_stop)` alone decides which keys are read, so the cost is proportional to
the number of visible keys, bidirectional spans included; no dense `[queries, keys]` mask is built. The online softmax
follows Milakov and Gimelshein 2018 (arXiv:1805.02867) in FlashAttention-2's form.

**A row's result does not depend on the other rows.** Blocks of keys begin at multiples of KEYS, sums run over the keys in one
order, and masked keys add exact zeros. So a token's result is bit-identical in a prefill, in any chunk of one, in a decode step
and in any batch. Fast-math is off for this reason: two compilations of this function must agree.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit, prange

from .simd import COLUMNS, DIGEST, ROWS, block_product, block_product_sum, row_exp2, row_maximum

# Numba keys its disk cache by this file alone, but the compiled code also contains what simd.py emits. So this file
# contains simd.py's digest: updating it after a change of simd.py invalidates the cached code, and while it is out of
# date nothing is cached. A test checks that it is current.
SIMD_DIGEST = "d7b6e8ca65cdb89c"
CACHE = DIGEST == SIMD_DIGEST

QUERIES = 128
KEYS = 256
_MASKED = np.float32(-1e30)  # a score that exp2 turns into 0 without the NaN of inf - inf
_LOG2E = np.float32(math.log2(math.e))


def _write(keys, values, slots, k, v):
    """Write `k`, `v` [tokens, kv_heads, head_dim] into pages; `slots` [tokens] is page * page_size + offset in the page.

    Keys are transposed COLUMNS tokens at a time, so that a cache line of a page is written at once.
    """
    page_size, head_panels = values.shape[3], values.shape[2]
    heads, head_dim = k.shape[1], k.shape[2]
    flat = keys.reshape(keys.size)
    for task in prange(-(-len(slots) // COLUMNS) * heads):
        head, first = task % heads, task // heads * COLUMNS
        last = min(first + COLUMNS, len(slots))
        places = np.empty(COLUMNS, np.int64)
        for token in range(first, last):
            page, offset = slots[token] // page_size, slots[token] % page_size
            panel = (page * heads + head) * (page_size // COLUMNS) + offset // COLUMNS
            places[token - first] = panel * head_dim * COLUMNS + offset % COLUMNS
            for panel in range(head_panels):
                for channel in range(min(COLUMNS, head_dim - panel * COLUMNS)):
                    values[page, head, panel, offset, channel] = v[token, head, panel * COLUMNS + channel]
        for channel in range(head_dim):
            for token in range(first, last):
                flat[places[token - first] + channel * COLUMNS] = k[token, head, channel]


@njit(inline="always")
def _cap(row, softcap, unit):
    """Replace scores in natural units by softcapped scores times log2(e), in place."""
    for j in range(len(row)):
        row[j] = np.float32(math.tanh(row[j] / softcap)) * (softcap * unit)


@njit(cache=CACHE)
def _aligned(rows, columns):
    """Return uninitialised memory [rows, columns] that starts on a cache line."""
    flat = np.empty(rows * columns + 16, np.float32)
    start = np.int64(-flat.ctypes.data % 64) // 4
    return flat[start : start + rows * columns].reshape(rows, columns)


@njit(inline="always")
def _mask(row, begin, end):
    """Mask the columns outside [begin, end)."""
    for j in range(min(max(begin, 0), len(row))):
        row[j] = _MASKED
    for j in range(max(end, 0), len(row)):
        row[j] = _MASKED


@njit(cache=CACHE)
def _softmax_step(row, begin, end, largest):
    """One step of the online softmax: replace base-2 scores by exp2(score - max), and those outside [begin, end) by 0.

    `row` is contiguous and a multiple of COLUMNS long; `largest` is the maximum of the previous blocks. Returns the
    maximum including this block, which is the one subtracted, and the sum of the row's weights.
    """
    if max(begin, 0) >= min(end, len(row)):
        row[:] = np.float32(0.0)
        return largest, np.float32(0.0)
    _mask(row, begin, end)
    largest = max(largest, row_maximum(row.ctypes.data, len(row)))
    return largest, row_exp2(row.ctypes.data, len(row), largest)


def _attend(q, keys, values, out, key_start, key_stop, seq_lens, block_table, tasks, scale, softcap, sinks):
    """Attention of `q` [queries, q_heads, head_dim] into `out`, all float32.

    `keys`, `values`: pages of one layer. `seq_lens` [sequences]: number of keys; `block_table` [sequences, pages].
    `tasks` int32 [n, 4]: sequence, KV head, first and end query. A task's rows are its queries times the heads of its group.
    `sinks` [q_heads] are logits without a value, or empty.
    """
    head_dim = q.shape[2]
    group = q.shape[1] // keys.shape[1]
    panels = keys.shape[2]  # of one page
    page_size = panels * COLUMNS
    head_panels = values.shape[2]
    channels = head_panels * COLUMNS
    unit = scale * _LOG2E if softcap <= 0.0 else scale
    for task in prange(len(tasks)):
        sequence, kv_head, first, end = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
        length = np.int64(seq_lens[sequence])
        count = np.int64(end - first) * group
        groups = -(-count // ROWS)
        rows = _aligned(groups * ROWS, head_dim)
        sums = _aligned(groups * ROWS, channels)
        block_sums = _aligned(groups * ROWS, channels)
        scores = _aligned(groups * ROWS, KEYS)
        rows[count:] = np.float32(0.0)
        sums[:] = np.float32(0.0)
        largest = np.full(groups * ROWS, _MASKED, np.float32)
        total = np.zeros(groups * ROWS, np.float32)
        rescale = np.ones(groups * ROWS, np.float32)
        row_start = np.full(groups * ROWS, np.int64(1) << 40, np.int64)
        row_stop = np.zeros(groups * ROWS, np.int64)
        group_first = np.empty(groups, np.int64)  # columns of the key block that a group of ROWS rows can see
        group_last = np.empty(groups, np.int64)
        block_start, block_stop = length, np.int64(0)
        for i in range(count):
            query, head = first + i // group, kv_head * group + i % group
            for channel in range(head_dim):
                rows[i, channel] = q[query, head, channel] * unit
            a = max(np.int64(key_start[query]), np.int64(0))
            b = min(np.int64(key_stop[query]), length)
            if a < b:
                row_start[i], row_stop[i] = a, b
                block_start, block_stop = min(block_start, a), max(block_stop, b)
        for key0 in range((block_start // KEYS) * KEYS, block_stop, KEYS):
            # Each panel is used by every group of rows before the next one is read, so it stays in the L1 cache.
            for g in range(groups):
                group_start, group_stop = row_start[g * ROWS], row_stop[g * ROWS]
                for r in range(g * ROWS + 1, (g + 1) * ROWS):
                    group_start, group_stop = min(group_start, row_start[r]), max(group_stop, row_stop[r])
                group_first[g] = (max(group_start - key0, 0) // COLUMNS) * COLUMNS
                group_last[g] = min(group_stop - key0, KEYS)
            for j in range(0, min(KEYS, block_stop - key0), COLUMNS):
                page = np.int64(block_table[sequence, (key0 + j) // page_size])
                panel = (page * keys.shape[1] + kv_head) * panels + (key0 + j) % page_size // COLUMNS
                for g in range(groups):
                    if (j >= group_first[g]) & (j < group_last[g]):
                        block_product(
                            rows.ctypes.data + np.uintp(g * ROWS * head_dim * 4), head_dim,
                            keys.ctypes.data + np.uintp(panel * head_dim * COLUMNS * 4), COLUMNS,
                            scores.ctypes.data + np.uintp((g * ROWS * KEYS + j) * 4), KEYS,
                            head_dim,
                        )  # fmt: skip
            for r in range(count):
                begin, columns = group_first[r // ROWS], group_last[r // ROWS]
                if begin >= columns:
                    continue
                row = scores[r, begin : -(-columns // COLUMNS) * COLUMNS]
                if softcap > 0.0:
                    _cap(row, softcap, _LOG2E)
                new, weight = _softmax_step(row, row_start[r] - key0 - begin, row_stop[r] - key0 - begin, largest[r])
                rescale[r] = np.float32(1.0)
                if new > largest[r]:
                    rescale[r] = np.float32(2.0) ** max(largest[r] - new, np.float32(-200.0))
                    largest[r] = new
                total[r] = total[r] * rescale[r] + weight
            for r in range(count, groups * ROWS):
                scores[r] = np.float32(0.0)
            for panel in range(head_panels):
                for j in range(0, min(KEYS, block_stop - key0), COLUMNS):
                    page = np.int64(block_table[sequence, (key0 + j) // page_size])
                    value = ((page * keys.shape[1] + kv_head) * head_panels + panel) * page_size + (
                        key0 + j
                    ) % page_size
                    for g in range(groups):
                        if (j >= group_first[g]) & (j < group_last[g]):
                            row = g * ROWS
                            weights = scores.ctypes.data + np.uintp((row * KEYS + j) * 4)
                            panel_values = values.ctypes.data + np.uintp(value * COLUMNS * 4)
                            target = block_sums.ctypes.data + np.uintp((row * channels + panel * COLUMNS) * 4)
                            terms = min(COLUMNS, group_last[g] - j)
                            if j == group_first[g]:
                                block_product(weights, KEYS, panel_values, COLUMNS, target, channels, terms)
                            else:
                                block_product_sum(weights, KEYS, panel_values, COLUMNS, target, channels, terms)
            for r in range(count):
                if group_first[r // ROWS] < group_last[r // ROWS]:
                    for channel in range(channels):
                        sums[r, channel] = sums[r, channel] * rescale[r] + block_sums[r, channel]
        for i in range(count):
            query, head = first + i // group, kv_head * group + i % group
            inverse = np.float32(1.0) / total[i] if total[i] > 0.0 else np.float32(0.0)
            if len(sinks) > 0 and total[i] > 0.0:
                # sums and total are relative to `largest`; the sink may be larger, so both are scaled down to the larger of the two.
                sink = sinks[head] * _LOG2E
                both = max(sink, largest[i])
                shrink = np.float32(2.0) ** max(largest[i] - both, np.float32(-200.0))
                inverse = shrink / (total[i] * shrink + np.float32(2.0) ** max(sink - both, np.float32(-200.0)))
            for channel in range(head_dim):
                out[query, head, channel] = sums[i, channel] * inverse


def _renamed(function: Any, name: str) -> Any:
    """The same function with another name.

    Numba's disk cache tells functions apart by name and line, not by options: a parallel and a sequential compilation of one function
    overwrite each other there, and whichever comes first is loaded for both.
    """
    copy = FunctionType(function.__code__, function.__globals__, name)
    copy.__qualname__, copy.__module__ = name, function.__module__
    return copy


write = njit(parallel=True, cache=CACHE)(_renamed(_write, "write"))
write_few = njit(cache=CACHE)(_renamed(_write, "write_few"))
attend = njit(parallel=True, cache=CACHE)(_renamed(_attend, "attend"))
attend_small = njit(cache=CACHE)(_renamed(_attend, "attend_small"))
