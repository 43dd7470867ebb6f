"""A decoder's operations other than attention, on the CPU in float32: linear maps, RMSNorm, rotary embedding, gated activation.

As in `attention.py`, a row's result does not depend on the other rows: sums run in the same order for every batch, which
libraries that choose a kernel by the number of rows do not guarantee. A few rows take as long as one row, because
either way all weights are read once.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .simd import (
    COLUMNS,
    DIGEST,
    ROWS,
    block_product,
    block_product_bf16,
    block_product_sum,
    block_product_sum_bf16,
    row_gate_gelu_tanh,
    row_gate_silu,
    row_product,
    row_product_bf16,
    row_product_sum,
    row_product_sum_bf16,
    widen_bf16,
)  # fmt: skip

SIMD_DIGEST = "d7b6e8ca65cdb89c"  # as in attention.py
CACHE = DIGEST == SIMD_DIGEST
DEPTH = 64  # terms per partial sum; the sum of partial sums has a few times less rounding error than one long sum
TOKENS = 256  # rows per task: together with one panel of weights they fit in the L2 cache
LANES = 16
# Up to FEW rows are computed one at a time, with half as many instructions per weight as in a padded block; for WIDENED rows or more a
# panel in bfloat16 is converted to float32 once, instead of in every tile.
FEW, WIDENED = 2, 48


@njit(inline="always")
def _long_product(x, weights, target, stride, inputs):
    """Compute one tile of `linear`; the arguments are addresses of the first row of x, a panel of weights and the result."""
    block_product(x, inputs, weights, COLUMNS, target, stride, min(DEPTH, inputs))
    for start in range(DEPTH, inputs, DEPTH):
        begin, depth = np.uintp(start * 4), min(DEPTH, inputs - start)
        block_product_sum(x + begin, inputs, weights + begin * np.uintp(COLUMNS), COLUMNS, target, stride, depth)


@njit(inline="always")
def _long_product_bf16(x, weights, target, stride, inputs):
    """`_long_product` of weights in bfloat16."""
    block_product_bf16(x, inputs, weights, COLUMNS, target, stride, min(DEPTH, inputs))
    for start in range(DEPTH, inputs, DEPTH):
        depth, skipped = min(DEPTH, inputs - start), np.uintp(2 * start * COLUMNS)
        block_product_sum_bf16(x + np.uintp(start * 4), inputs, weights + skipped, COLUMNS, target, stride, depth)


@njit(inline="always")
def _long_row(x, weights, target, inputs):
    """`_long_product` of one row."""
    row_product(x, inputs, weights, COLUMNS, target, COLUMNS, min(DEPTH, inputs))
    for start in range(DEPTH, inputs, DEPTH):
        begin, depth = np.uintp(start * 4), min(DEPTH, inputs - start)
        row_product_sum(x + begin, inputs, weights + begin * np.uintp(COLUMNS), COLUMNS, target, COLUMNS, depth)


@njit(inline="always")
def _long_row_bf16(x, weights, target, inputs):
    """`_long_row` of weights in bfloat16."""
    row_product_bf16(x, inputs, weights, COLUMNS, target, COLUMNS, min(DEPTH, inputs))
    for start in range(DEPTH, inputs, DEPTH):
        depth, skipped = min(DEPTH, inputs - start), np.uintp(2 * start * COLUMNS)
        row_product_sum_bf16(x + np.uintp(start * 4), inputs, weights + skipped, COLUMNS, target, COLUMNS, depth)


@njit
def linear_tasks(rows, panels):
    """The number of tasks of `linear_task`."""
    return -(-rows // TOKENS) * len(panels)


@njit
def linear_task(task, x, rows, rest, panels, out):
    """Compute one panel of outputs for up to TOKENS of the first `rows` rows of `x`.

    `rest` are the rows after the last whole block of ROWS, ROWS of them if there are more than FEW. Panels of uint16 are bfloat16.
    """
    inputs, bf16 = x.shape[1], panels.itemsize == 2
    whole = rows // ROWS * ROWS
    panel, first = task % len(panels), task // len(panels) * TOKENS
    last = min(first + TOKENS, whole)
    weights = panels.ctypes.data + np.uintp(panel * inputs * COLUMNS * panels.itemsize)
    wide = np.empty(inputs * COLUMNS + 16 if bf16 and last - first >= WIDENED else 0, np.float32)
    if len(wide):
        # Numba frees an array after its last use, of which it does not take an address for one: `wide` is used inside the loop.
        skipped = np.uintp(-wide.ctypes.data % 64)
        widen_bf16(weights, wide.ctypes.data + skipped, inputs * COLUMNS)
        for row in range(first, last, ROWS):
            target = out.ctypes.data + np.uintp((row * out.shape[1] + panel * COLUMNS) * 4)
            source = x.ctypes.data + np.uintp(row * inputs * 4)
            _long_product(source, wide.ctypes.data + skipped, target, out.shape[1], inputs)
    else:
        for row in range(first, last, ROWS):
            target = out.ctypes.data + np.uintp((row * out.shape[1] + panel * COLUMNS) * 4)
            source = x.ctypes.data + np.uintp(row * inputs * 4)
            if bf16:
                _long_product_bf16(source, weights, target, out.shape[1], inputs)
            else:
                _long_product(source, weights, target, out.shape[1], inputs)
    if first + TOKENS < rows:
        return
    if rows - whole <= FEW:
        for row in range(whole, rows):
            target = out.ctypes.data + np.uintp((row * out.shape[1] + panel * COLUMNS) * 4)
            source = x.ctypes.data + np.uintp(row * inputs * 4)
            if bf16:
                _long_row_bf16(source, weights, target, inputs)
            else:
                _long_row(source, weights, target, inputs)
    else:
        block = np.empty((ROWS, COLUMNS), np.float32)
        if bf16:
            _long_product_bf16(rest.ctypes.data, weights, block.ctypes.data, COLUMNS, inputs)
        else:
            _long_product(rest.ctypes.data, weights, block.ctypes.data, COLUMNS, inputs)
        out[whole:rows, panel * COLUMNS : (panel + 1) * COLUMNS] = block[: rows - whole]


@njit(parallel=True, cache=CACHE)
def linear(x, panels, out):
    """Write x @ weights to `out`: x [rows, inputs], out [rows, n * COLUMNS].

    `panels` [n, inputs, COLUMNS] are the weights [inputs, n * COLUMNS] cut into blocks of COLUMNS columns.
    """
    rows, inputs = x.shape
    whole = rows // ROWS * ROWS
    rest = np.zeros((0 if rows - whole <= FEW else ROWS, inputs), np.float32)  # the last rows, padded to a block
    if len(rest):
        rest[: rows - whole] = x[whole:]
    for task in prange(linear_tasks(rows, panels)):
        linear_task(task, x, rows, rest, panels, out)


@njit
def _rms_row(x, weight, epsilon, out):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) of one row; the sum of squares runs in LANES lanes."""
    width = len(x)
    lanes = np.zeros(LANES, np.float32)
    whole = width // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += x[start + lane] * x[start + lane]
    for element in range(whole, width):
        lanes[element - whole] += x[element] * x[element]
    total = np.float32(0.0)
    for lane in range(LANES):
        total += lanes[lane]
    inverse_rms = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(width) + epsilon))
    for element in range(width):
        out[element] = x[element] * inverse_rms * weight[element]


@njit
def _padded(rows):
    """The rows that `linear_task` needs for `rows` rows to have no `rest` that must be copied."""
    return -(-rows // ROWS) * ROWS


@njit(parallel=True, cache=CACHE)
def grouped_linear(x, starts, counts, tasks, panels, out):
    """`linear` of groups of rows, each with weights of its own: rows `starts[g]` to `starts[g] + counts[g]` with `panels[g]`.

    A group starts at a multiple of ROWS, and the rows after its last one, up to the next multiple, can be read. `tasks` `[n, 2]` has
    for each task its group and its number in `linear_task`; `panels` is `[groups, n, inputs, COLUMNS]`.
    """
    for number in prange(len(tasks)):
        group, rows = tasks[number, 0], counts[tasks[number, 0]]
        first = starts[group]
        mine = x[first : first + _padded(rows)]
        linear_task(tasks[number, 1], mine, rows, mine[rows // ROWS * ROWS :], panels[group], out[first : first + rows])


@njit(parallel=True, cache=CACHE)
def linear_of_norm(x, weight, epsilon, panels, out):
    """`linear` of `rms_norm` in one launch for few rows: one thread normalises, then all compute the product."""
    rows = len(x)
    ready = np.zeros((_padded(rows), x.shape[1]), np.float32)
    for row in range(rows):
        _rms_row(x[row], weight, epsilon, ready[row])
    for task in prange(linear_tasks(rows, panels)):
        linear_task(task, ready, rows, ready[rows // ROWS * ROWS :], panels, out)


@njit(parallel=True, cache=CACHE)
def linear_of_gate(both, gelu, panels, out):
    """Write `linear(gate(both), panels)` to `out` in one launch: one thread computes the gate, then all threads the product.

    `both` is `[rows, 2 * inputs]`. Correct for any number of rows, but slow for many.
    """
    rows = len(both)
    ready = np.zeros((_padded(rows), both.shape[1] // 2), np.float32)
    for row in range(rows):
        _gate_row(both[row], ready.shape[1], gelu, ready[row])
    for task in prange(linear_tasks(rows, panels)):
        linear_task(task, ready, rows, ready[rows // ROWS * ROWS :], panels, out)


@njit(parallel=True, cache=CACHE)
def rms_norm(x, weight, epsilon, out):
    """Write the rows of `x` [rows, width], normalised and multiplied by `weight`, to `out`."""
    for row in prange(len(x)):
        _rms_row(x[row], weight, epsilon, out[row])


@njit(cache=CACHE)
def rms_norm_few(x, weight, epsilon, out):
    """`rms_norm` in one thread."""
    for row in range(len(x)):
        _rms_row(x[row], weight, epsilon, out[row])


@njit
def _gate_row(both, width, gelu, out):
    whole = width // COLUMNS * COLUMNS
    gate, up, target = both.ctypes.data, both.ctypes.data + np.uintp(width * 4), out.ctypes.data
    if gelu:
        row_gate_gelu_tanh(gate, up, target, whole)
    else:
        row_gate_silu(gate, up, target, whole)
    if whole < width:
        rest = np.zeros((3, COLUMNS), np.float32)
        rest[0, : width - whole] = both[whole:width]
        rest[1, : width - whole] = both[width + whole :]
        address = rest.ctypes.data
        gate, up, target = address, address + np.uintp(COLUMNS * 4), address + np.uintp(2 * COLUMNS * 4)
        if gelu:
            row_gate_gelu_tanh(gate, up, target, COLUMNS)
        else:
            row_gate_silu(gate, up, target, COLUMNS)
        out[whole:] = rest[2, : width - whole]


@njit(parallel=True, cache=CACHE)
def gate(both, gelu, out):
    """out [rows, width] = activation(both[:, :width]) * both[:, width:]; SiLU, or tanh-approximated GELU if `gelu`."""
    for row in prange(len(both)):
        _gate_row(both[row], out.shape[1], gelu, out[row])


@njit(cache=CACHE)
def gate_few(both, gelu, out):
    """The same as `gate`, in one thread: for few rows faster than starting threads."""
    for row in range(len(both)):
        _gate_row(both[row], out.shape[1], gelu, out[row])


@njit(parallel=True, cache=CACHE)
def sigmoid(x, out):
    """out = 1 / (1 + exp(-x)), for rows of `x` [rows, width]."""
    for row in prange(len(x)):
        for element in range(x.shape[1]):
            out[row, element] = np.float32(1.0) / (np.float32(1.0) + np.float32(math.exp(-x[row, element])))


@njit(parallel=True, cache=CACHE)
def softplus(x, out):
    """out = log(1 + exp(x)), for rows of `x` [rows, width]."""
    for row in prange(len(x)):
        for element in range(x.shape[1]):
            value = x[row, element]
            out[row, element] = value if value > 20.0 else np.float32(math.log1p(math.exp(value)))


@njit(inline="always")
def _rotate_token(x, cosine, sine, heads, interleaved, out):
    pairs = len(cosine)
    for head in range(heads):
        for pair in range(pairs):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
            first, second = x[head, a], x[head, b]
            out[head, a] = first * cosine[pair] - second * sine[pair]
            out[head, b] = second * cosine[pair] + first * sine[pair]
        for channel in range(2 * pairs, x.shape[1]):
            out[head, channel] = x[head, channel]


@njit(parallel=True, cache=CACHE)
def rotate(x, cosine, sine, interleaved, out):
    """Rotary embedding of `x` [tokens, heads, head_dim] by `cosine`, `sine` [tokens, pairs]; channels past the pairs are copied."""
    for token in prange(len(x)):
        _rotate_token(x[token], cosine[token], sine[token], x.shape[1], interleaved, out[token])


@njit(cache=CACHE)
def rotate_few(x, cosine, sine, interleaved, out):
    """`rotate` in one thread."""
    for token in range(len(x)):
        _rotate_token(x[token], cosine[token], sine[token], x.shape[1], interleaved, out[token])
