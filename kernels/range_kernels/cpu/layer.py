"""All layers of a decoder on the CPU in one native call, of the kernels in `ops.py` and `attention.py`, so with the same bits.

Between the kernels nothing returns to Python, whose own data every layer's weights have pushed out of the caches: for one token of
SmolLM2-135M that is a quarter of a decode step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from numba import carray, njit, prange

from . import attention, ops
from .simd import COLUMNS, DIGEST, floats_at

# Numba's cache of this file contains the code of these files too (`attention.py` says more).
KERNELS_DIGEST = "d1f83f444a7972ad"
_SOURCES = "".join(Path(module.__file__).read_text() for module in (attention, ops)) + DIGEST
SOURCES_DIGEST = hashlib.sha256(_SOURCES.encode()).hexdigest()[:16]
CACHE = KERNELS_DIGEST == SOURCES_DIGEST

SMALL_ROWS = 1 << 14  # below this many numbers one thread does what is not a matrix product
SMALL_WORK = 1 << 18  # and below this many multiply-adds attention


@njit(parallel=True, cache=CACHE)
def _add(total, added):
    for row in prange(len(total)):
        for element in range(total.shape[1]):
            total[row, element] += added[row, element]


@njit(cache=CACHE)
def _add_few(total, added):
    for row in range(len(total)):
        for element in range(total.shape[1]):
            total[row, element] += added[row, element]


@njit(cache=CACHE)
def _sum(total, added):
    if total.size < SMALL_ROWS:
        _add_few(total, added)
    else:
        _add(total, added)


@njit(cache=CACHE)
def _norm(x, weight, epsilon, out):
    if x.size < SMALL_ROWS:
        ops.rms_norm_few(x, weight, epsilon, out)
    else:
        ops.rms_norm(x, weight, epsilon, out)


@njit(cache=CACHE)
def _bias(out, bias):
    if len(bias):
        for row in range(len(out)):
            for element in range(len(bias)):
                out[row, element] += bias[element]


@njit(cache=CACHE)
def _linear_of_norm(x, weight, epsilon, panels, bias, normed, out):
    if x.size < SMALL_ROWS:
        ops.linear_of_norm(x, weight, epsilon, panels, out)
    else:
        ops.rms_norm(x, weight, epsilon, normed)
        ops.linear(normed, panels, out)
    _bias(out, bias)


@njit(cache=CACHE)
def _head_norms(heads, queries, weights, epsilon):
    """RMSNorm of each head in place: `weights[0]` for the first `queries` heads, `weights[1]` for the others."""
    for token in range(len(heads)):
        for head in range(heads.shape[1]):
            row = heads[token, head]
            ops._rms_row(row, weights[0 if head < queries else 1], epsilon, row)


# Columns of the table of addresses: a layer's norms, linear layers and biases, and its head norms.
NORMS, LINEARS, BIASES, HEAD_NORMS, FIELDS = 0, 4, 8, 12, 13


@njit(cache=CACHE)
def _vector(address, size):
    """`size` numbers at `address`, none at address 0."""
    return carray(floats_at(address), (size if address else 0,))


@njit(cache=CACHE)
def _matrix(address, rows, columns):
    return carray(floats_at(address), (rows if address else 0, columns))


@njit(cache=CACHE)
def _panels(address, outputs, inputs):
    return carray(floats_at(address), (outputs // COLUMNS, inputs, COLUMNS))


@njit(cache=CACHE)
def decoder_layers(
    total, added, weights, epsilon, gelu, rotations, interleaved, rope_of, key_starts, window_of, key_stop, keys, values, slots,
    seq_lens, block_table, tasks, scale, softcap, qkv, seen, both, product, normed,
):  # fmt: skip
    """Run the layers: `total` `[tokens, hidden]` is hidden state 0; `total + added` is the result, and both are overwritten.

    Args:
        weights: int64 `[layers, FIELDS]`, addresses of float32 numbers: norms `[hidden]` before and after attention, before and after the
            MLP; panels as in `ops.linear` and biases `[outputs]` of QKV, output, gate and up, down; head norms `[2, head_dim]`. 0: none.
        rotations: `[ropes, 2, tokens, pairs]`, cosines and sines; interleaved: bool `[ropes]`; rope_of: `[layers]`, -1: no rotation.
        key_starts: int32 `[windows, tokens]`; window_of: `[layers]`.
        keys, values: pages of all layers; slots, key_stop, seq_lens, block_table, tasks: as in `attention.attend`.
        qkv, seen, both, product, normed: memory for QKV `[tokens, heads, head_dim]`, attention `[tokens, q_heads, head_dim]`, gate and up
            `[tokens, 2 * intermediate]`, their product `[tokens, intermediate]` and a norm `[tokens, hidden]`.
    """
    tokens, hidden = total.shape
    intermediate, head_dim, q_heads = product.shape[1], qkv.shape[2], seen.shape[1]
    rotated = (q_heads + qkv.shape[1]) // 2
    stacked, heads = qkv.shape[1] * head_dim, q_heads * head_dim
    small = total.size < SMALL_ROWS
    flat_qkv, flat_seen = qkv.reshape(tokens, stacked), seen.reshape(tokens, heads)
    for layer in range(len(weights)):
        at = weights[layer]
        attention_norm, after_attention = _vector(at[NORMS], hidden), _vector(at[NORMS + 1], hidden)
        mlp_norm, after_mlp = _vector(at[NORMS + 2], hidden), _vector(at[NORMS + 3], hidden)
        head_norms = _matrix(at[HEAD_NORMS], 2, head_dim)
        if layer:
            _sum(total, added)
        _linear_of_norm(
            total, attention_norm, epsilon, _panels(at[LINEARS], stacked, hidden), _vector(at[BIASES], stacked), normed, flat_qkv
        )
        if len(head_norms):
            _head_norms(qkv[:, :rotated], q_heads, head_norms, epsilon)
        rope = rope_of[layer]
        if rope >= 0:
            cosine, sine = rotations[rope, 0], rotations[rope, 1]
            if small:
                ops.rotate_few(qkv[:, :rotated], cosine, sine, interleaved[rope], qkv[:, :rotated])
            else:
                ops.rotate(qkv[:, :rotated], cosine, sine, interleaved[rope], qkv[:, :rotated])
        new = qkv[:, q_heads:rotated], qkv[:, rotated:]
        if small:
            attention.write_few(keys[layer], values[layer], slots, new[0], new[1])
        else:
            attention.write(keys[layer], values[layer], slots, new[0], new[1])
        start = key_starts[window_of[layer]]
        if seq_lens.max() * seen.size < SMALL_WORK:
            attention.attend_small(
                qkv[:, :q_heads], keys[layer], values[layer], seen, start, key_stop, seq_lens, block_table, tasks, scale, softcap
            )
        else:
            attention.attend(
                qkv[:, :q_heads], keys[layer], values[layer], seen, start, key_stop, seq_lens, block_table, tasks, scale, softcap
            )
        ops.linear(flat_seen, _panels(at[LINEARS + 1], hidden, heads), added)
        _bias(added, _vector(at[BIASES + 1], hidden))
        if len(after_attention):
            _norm(added, after_attention, epsilon, added)
        _sum(total, added)
        _linear_of_norm(
            total, mlp_norm, epsilon, _panels(at[LINEARS + 2], 2 * intermediate, hidden), _vector(at[BIASES + 2], 2 * intermediate),
            normed, both,
        )  # fmt: skip
        down = _panels(at[LINEARS + 3], hidden, intermediate)
        if both.size < SMALL_ROWS:
            ops.linear_of_gate(both, gelu, down, added)
        else:
            ops.gate(both, gelu, product)
            ops.linear(product, down, added)
        _bias(added, _vector(at[BIASES + 3], hidden))
        if len(after_mlp):
            _norm(added, after_mlp, epsilon, added)
