"""Attention over packed sequences on the CPU: an online softmax over tiles, with panels packed once per call.

    pack      K -> [kv_heads, panels, head_dim, COLUMNS]     COLUMNS keys side by side, transposed
              V -> [kv_heads, head_panels, keys, COLUMNS]    COLUMNS channels side by side
    a task    QUERIES rows of one head and sequence; for each block of KEYS keys:
              S = Q K^T (panels no row of the group can see are skipped) -> mask by low/reach -> exp2 -> O += P V

The transposed panels serve every block of queries, so packing costs one pass over K and V. A row's interval
`[low, reach]` alone decides what is skipped: bidirectional spans cost what their visible keys cost, no dense mask exists.
The online softmax follows Milakov and Gimelshein 2018 (arXiv:1805.02867) as FlashAttention-2 arranges it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .vector import COLUMNS, DIGEST, ROWS, block_product, block_product_add, row_exp2, row_maximum

# Numba keys its disk cache by this file alone, while compiled code also holds what vector.py emits. Naming vector.py's
# digest here makes a change there a change here; until it is named anew nothing is cached. A test keeps the two together.
VECTOR_DIGEST = "2e794482f794cf18"
CACHE = DIGEST == VECTOR_DIGEST

QUERIES = 128
KEYS = 256
GROUPS = QUERIES // ROWS
_HIDDEN = np.float32(-1e30)  # a score that exp2 turns into 0 without the NaN of inf - inf
# Sums may be reordered, but NaN and infinity keep their meaning: a NaN row must come out as NaN, not as a plausible answer.
_FAST = {"contract", "nsz", "arcp", "reassoc"}
_LOG2E = np.float32(math.log2(math.e))


@njit(parallel=True, cache=CACHE)
def pack_keys(k, cu_seqlens_k, panel_start, packed):
    """k [keys, kv_heads, head_dim] -> packed [kv_heads, panels, head_dim, COLUMNS]; columns past a sequence are 0."""
    sequences = len(cu_seqlens_k) - 1
    kv_heads, panels, head_dim = packed.shape[0], packed.shape[1], packed.shape[2]
    sequence_of = np.empty(panels, np.int64)
    for sequence in range(sequences):
        for panel in range(panel_start[sequence], panel_start[sequence + 1]):
            sequence_of[panel] = sequence
    for task in prange(kv_heads * panels):
        head = task // panels
        panel = task % panels
        sequence = sequence_of[panel]
        first = cu_seqlens_k[sequence] + (panel - panel_start[sequence]) * COLUMNS
        count = min(COLUMNS, cu_seqlens_k[sequence + 1] - first)
        for channel in range(head_dim):
            for column in range(count):
                packed[head, panel, channel, column] = k[first + column, head, channel]
            for column in range(count, COLUMNS):
                packed[head, panel, channel, column] = np.float32(0.0)


@njit(parallel=True, cache=CACHE)
def pack_values(v, packed):
    """v [keys, kv_heads, head_dim] -> packed [kv_heads, head_panels, keys, COLUMNS]; channels past head_dim are 0."""
    keys, kv_heads, head_dim = v.shape
    head_panels = packed.shape[1]
    blocks = (keys + KEYS - 1) // KEYS
    for task in prange(kv_heads * blocks):
        head = task // blocks
        first = (task % blocks) * KEYS
        for panel in range(head_panels):
            channels = min(COLUMNS, head_dim - panel * COLUMNS)
            for key in range(first, min(first + KEYS, keys)):
                for channel in range(channels):
                    packed[head, panel, key, channel] = v[key, head, panel * COLUMNS + channel]
                for channel in range(channels, COLUMNS):
                    packed[head, panel, key, channel] = np.float32(0.0)


@njit(inline="always", fastmath=_FAST)
def _cap(row, softcap, unit):
    """Scores in natural units -> softcapped scores times log2(e), in place."""
    for j in range(len(row)):
        row[j] = np.float32(math.tanh(row[j] / softcap)) * (softcap * unit)


@njit(cache=CACHE)
def _aligned(rows, columns):
    """Zeros [rows, columns] that start on a cache line."""
    flat = np.zeros(rows * columns + 16, np.float32)
    start = np.int64(-flat.ctypes.data % 64) // 4
    return flat[start : start + rows * columns].reshape(rows, columns)


@njit(inline="always")
def _mask(row, begin, end):
    """Hide the columns outside [begin, end)."""
    for j in range(min(max(begin, 0), len(row))):
        row[j] = _HIDDEN
    for j in range(max(end, 0), len(row)):
        row[j] = _HIDDEN


@njit(fastmath=_FAST, cache=CACHE)
def _soften(row, begin, end, largest):
    """Mask a row of base-2 scores to columns [begin, end), replace it by exp2(score - max); return (max, sum).

    `row` is contiguous and a multiple of COLUMNS long; `largest` is the maximum of the blocks before.
    """
    if max(begin, 0) >= min(end, len(row)):
        row[:] = np.float32(0.0)
        return largest, np.float32(0.0)
    _mask(row, begin, end)
    largest = max(largest, row_maximum(row.ctypes.data, len(row)))
    return largest, row_exp2(row.ctypes.data, len(row), largest)


@njit(parallel=True, fastmath=_FAST, cache=CACHE)
def prefill(q, keys, values, out, low, reach, cu_seqlens_k, panel_start, tasks, scale, softcap):
    """Attention of `q` [queries, q_heads, head_dim] into `out`, all float32.

    `keys`, `values`: packed panels. `tasks` int32 [n, 4]: sequence, head, first and end query of each block.
    """
    head_dim = q.shape[2]
    group = q.shape[1] // keys.shape[0]
    head_panels = values.shape[1]
    channels = head_panels * COLUMNS
    unit = scale * _LOG2E if softcap <= 0.0 else scale
    for task in prange(len(tasks)):
        sequence, head, first, end = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
        kv_head = head // group
        key_offset = np.int64(cu_seqlens_k[sequence])
        length = np.int64(cu_seqlens_k[sequence + 1]) - key_offset
        first_panel = np.int64(panel_start[sequence])
        rows = _aligned(QUERIES, head_dim)
        sums = _aligned(QUERIES, channels)
        scores = _aligned(QUERIES, KEYS)
        largest = np.full(QUERIES, _HIDDEN, np.float32)
        total = np.zeros(QUERIES, np.float32)
        row_low = np.full(QUERIES, np.int64(1) << 40, np.int64)
        row_end = np.zeros(QUERIES, np.int64)
        group_first = np.empty(GROUPS, np.int64)  # columns of the key block that a group of ROWS rows can see
        group_last = np.empty(GROUPS, np.int64)
        block_low, block_end = length, np.int64(0)
        for i in range(end - first):
            for channel in range(head_dim):
                rows[i, channel] = q[first + i, head, channel] * unit
            a = max(np.int64(low[first + i]), np.int64(0))
            b = min(np.int64(reach[first + i]) + 1, length)
            if a < b:
                row_low[i], row_end[i] = a, b
                block_low, block_end = min(block_low, a), max(block_end, b)
        for key0 in range((block_low // COLUMNS) * COLUMNS, block_end, KEYS):
            # Each panel is used by every group of rows before the next one is read, so it stays in the first-level cache.
            for g in range(GROUPS):
                group_low, group_end = row_low[g * ROWS], row_end[g * ROWS]
                for r in range(g * ROWS + 1, (g + 1) * ROWS):
                    group_low, group_end = min(group_low, row_low[r]), max(group_end, row_end[r])
                group_first[g] = (max(group_low - key0, 0) // COLUMNS) * COLUMNS
                group_last[g] = min(group_end - key0, KEYS)
            for j in range(0, min(KEYS, block_end - key0), COLUMNS):
                panel = first_panel + (key0 + j) // COLUMNS
                for g in range(GROUPS):
                    if (j >= group_first[g]) & (j < group_last[g]):
                        block_product(
                            rows.ctypes.data + np.uintp(g * ROWS * head_dim * 4), head_dim,
                            keys.ctypes.data + np.uintp((kv_head * keys.shape[1] + panel) * head_dim * COLUMNS * 4), COLUMNS,
                            scores.ctypes.data + np.uintp((g * ROWS * KEYS + j) * 4), KEYS,
                            head_dim,
                        )  # fmt: skip
            for r in range(QUERIES):
                begin, columns = group_first[r // ROWS], group_last[r // ROWS]
                if begin >= columns:
                    continue
                row = scores[r, begin : -(-columns // COLUMNS) * COLUMNS]
                if softcap > 0.0:
                    _cap(row, softcap, _LOG2E)
                new, weight = _soften(row, row_low[r] - key0 - begin, row_end[r] - key0 - begin, largest[r])
                if new > largest[r]:
                    shrink = np.float32(2.0) ** max(largest[r] - new, np.float32(-200.0))
                    total[r] *= shrink
                    for channel in range(channels):
                        sums[r, channel] *= shrink
                    largest[r] = new
                total[r] += weight
            for panel in range(head_panels):
                value = (kv_head * head_panels + panel) * values.shape[2] + key_offset + key0
                for g in range(GROUPS):
                    begin = group_first[g]
                    if begin < group_last[g]:
                        block_product_add(
                            scores.ctypes.data + np.uintp((g * ROWS * KEYS + begin) * 4), KEYS,
                            values.ctypes.data + np.uintp((value + begin) * COLUMNS * 4), COLUMNS,
                            sums.ctypes.data + np.uintp((g * ROWS * channels + panel * COLUMNS) * 4), channels,
                            group_last[g] - begin,
                        )  # fmt: skip
        for i in range(end - first):
            shrink = np.float32(1.0) / total[i] if total[i] > 0.0 else np.float32(0.0)
            for channel in range(head_dim):
                out[first + i, head, channel] = sums[i, channel] * shrink


def _decode(q, k, v, out, low, reach, key_offset, scale, softcap):
    """Few queries a sequence: one task a (query, KV head), reading K and V where they lie, no packing."""
    queries, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    unit = scale * _LOG2E if softcap <= 0.0 else scale
    for task in prange(queries * kv_heads):
        query = task // kv_heads
        kv_head = task % kv_heads
        offset = key_offset[query, 0]
        begin = max(np.int64(low[query]), np.int64(0))
        end = min(np.int64(reach[query]) + 1, key_offset[query, 1] - offset)
        count = max(end - begin, 0)
        scores = np.empty(-(-count // COLUMNS) * COLUMNS, np.float32)
        for head in range(kv_head * group, (kv_head + 1) * group):
            for j in range(count):
                dot = np.float32(0.0)
                for channel in range(head_dim):
                    dot += q[query, head, channel] * k[offset + begin + j, kv_head, channel]
                scores[j] = dot * unit
            if softcap > 0.0:
                _cap(scores, softcap, _LOG2E)
            _, total = _soften(scores, 0, count, _HIDDEN)
            sums = np.zeros(head_dim, np.float32)
            for j in range(count):
                weight = scores[j]
                for channel in range(head_dim):
                    sums[channel] += weight * v[offset + begin + j, kv_head, channel]
            shrink = np.float32(1.0) / total if total > 0.0 else np.float32(0.0)
            for channel in range(head_dim):
                out[query, head, channel] = sums[channel] * shrink


decode = njit(parallel=True, fastmath=_FAST, cache=CACHE)(_decode)
decode_small = njit(fastmath=_FAST, cache=CACHE)(_decode)
