"""All layers of a decoder on the CPU in one parallel region, of the kernels in `ops.py` and `attention.py`, so with the same bits.

Each thread computes its share of one part of a layer after the other, and waits at a barrier between them. The kernels alone start
and end a parallel region each, a hundred and fifty per step of SmolLM2-135M; and once a process has had more threads than cores, as
with torch's in one thread and an engine in another, GNU OpenMP puts its threads to sleep after each of them: a step of 25 ms took 44.
Python between the kernels took another quarter of a step, because the weights of every layer push its data out of the caches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numba import carray, njit, prange

from . import attention, ops
from .simd import COLUMNS, DIGEST, atomic_add, atomic_load, atomic_replace, floats_at, halves_at, let_others_run, spin

# Numba's cache of this file contains the code of these files too (`attention.py` says more).
KERNELS_DIGEST = "a919b44566d83fe1"
_SOURCES = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("attention", "ops"))
SOURCES_DIGEST = hashlib.sha256(_SOURCES + DIGEST.encode()).hexdigest()[:16]
CACHE = KERNELS_DIGEST == SOURCES_DIGEST

# Columns of the table: addresses of a layer's norms, linear layers, biases and head norms, and whether each linear layer is in bfloat16.
NORMS, LINEARS, BIASES, HEAD_NORMS, BF16, FIELDS = 0, 4, 8, 12, 13, 17
# Fields of `state`: how many threads have arrived, in all, and how many are there at all (negative once one has given up).
ARRIVED, STARTED, STATE = 0, 8, 16  # on two cache lines
_SPINS = 2000  # a fraction of a millisecond; then the core is offered to others each time
_PATIENCE = 200_000  # offers, at least a tenth of a second: a thread that has not started by then runs after this one, not beside it


@njit(cache=CACHE)
def _barrier(place, wanted):
    """Count this thread's arrival at `place`, wait until `wanted` have been counted, and return that number."""
    atomic_add(place, 1)
    spins = 0
    while atomic_load(place) < wanted:
        spins += 1
        if spins < _SPINS:
            spin()
        else:
            let_others_run()
    return wanted


@njit(cache=CACHE)
def _all_started(state, threads):
    """Whether all threads run at the same time, without which a barrier would wait forever. The answer is the same for all of them."""
    place = state.ctypes.data + 8 * STARTED
    count = atomic_add(place, 1) + 1
    spins = 0
    while 0 <= count < threads:
        spins += 1
        if spins < _SPINS:
            spin()
        elif spins < _PATIENCE:
            let_others_run()
        elif atomic_replace(place, count, -(1 << 40)):
            return False
        count = atomic_load(place)
    return count >= threads


@njit(cache=CACHE)
def _vector(address, size):
    """`size` numbers at `address`, none at address 0."""
    return carray(floats_at(address), (size if address else 0,))


@njit(cache=CACHE)
def _matrix(address, rows, columns):
    return carray(floats_at(address), (rows if address else 0, columns))


@njit(cache=CACHE)
def _bias(out, bias):
    if len(bias):
        for row in range(len(out)):
            for element in range(len(bias)):
                out[row, element] += bias[element]


@njit(cache=CACHE)
def _add(total, added):
    for row in range(len(total)):
        for element in range(total.shape[1]):
            total[row, element] += added[row, element]


@njit(cache=CACHE)
def _share_of_linear(x, rows, panels, out, share, threads):
    tasks = ops.linear_tasks(rows, panels)
    rest = x[rows // ops.ROWS * ops.ROWS :]
    for task in range(tasks * share // threads, tasks * (share + 1) // threads):
        ops.linear_task(task, x, rows, rest, panels, out)


@njit(cache=CACHE)
def _linear(x, rows, weights, number, out, share, threads):
    """This thread's share of `ops.linear` of the first `rows` rows of `x`, which has whole blocks of rows.

    `number`: of the linear layer in a row `weights` of the table.
    """
    shape = (out.shape[1] // COLUMNS, x.shape[1], COLUMNS)
    if weights[BF16 + number]:
        _share_of_linear(x, rows, carray(halves_at(weights[LINEARS + number]), shape), out, share, threads)
    else:
        _share_of_linear(x, rows, carray(floats_at(weights[LINEARS + number]), shape), out, share, threads)


@njit(cache=CACHE)
def _head_norms(heads, queries, weights, epsilon):
    """RMSNorm of each head in place: `weights[0]` for the first `queries` heads, `weights[1]` for the others."""
    for token in range(len(heads)):
        for head in range(heads.shape[1]):
            row = heads[token, head]
            ops._rms_row(row, weights[0 if head < queries else 1], epsilon, row)


@njit(cache=CACHE)
def _run_share(
    share, threads, state, total, added, weights, epsilon, gelu, rotations, interleaved, rope_of, key_starts, window_of, key_stop, keys,
    values, slots, seq_lens, block_table, tasks, scale, softcap, qkv, seen, both, product, normed,
):  # fmt: skip
    """One thread's share of `decoder_layers`."""
    if not _all_started(state, threads):
        return
    tokens, hidden = total.shape
    intermediate, head_dim, q_heads = product.shape[1], qkv.shape[2], seen.shape[1]
    rotated = (q_heads + qkv.shape[1]) // 2
    stacked, heads = qkv.shape[1] * head_dim, q_heads * head_dim
    flat_qkv, flat_seen = qkv.reshape(tokens, stacked), seen.reshape(len(seen), heads)
    barrier, passed = state.ctypes.data + 8 * ARRIVED, 0
    a, b = tokens * share // threads, tokens * (share + 1) // threads  # this thread's rows, outside of matrix products
    first_task, last_task = len(tasks) * share // threads, len(tasks) * (share + 1) // threads
    new = qkv[a:b]
    for layer in range(len(weights)):
        at = weights[layer]
        if layer:
            _add(total[a:b], added[a:b])
        ops.rms_norm_few(total[a:b], _vector(at[NORMS], hidden), epsilon, normed[a:b])
        passed = _barrier(barrier, passed + threads)
        _linear(normed, tokens, at, 0, flat_qkv, share, threads)
        passed = _barrier(barrier, passed + threads)
        _bias(flat_qkv[a:b], _vector(at[BIASES], stacked))
        head_norms = _matrix(at[HEAD_NORMS], 2, head_dim)
        if len(head_norms):
            _head_norms(new[:, :rotated], q_heads, head_norms, epsilon)
        rope = rope_of[layer]
        if rope >= 0:
            cosine, sine = rotations[rope, 0, a:b], rotations[rope, 1, a:b]
            ops.rotate_few(new[:, :rotated], cosine, sine, interleaved[rope], new[:, :rotated])
        attention.write_few(keys[layer], values[layer], slots[a:b], new[:, q_heads:rotated], new[:, rotated:])
        passed = _barrier(barrier, passed + threads)
        attention.attend_small(
            qkv[:, :q_heads], keys[layer], values[layer], seen, key_starts[window_of[layer]], key_stop, seq_lens, block_table,
            tasks[first_task:last_task], scale, softcap, np.empty(0, np.float32),
        )  # fmt: skip
        passed = _barrier(barrier, passed + threads)
        _linear(flat_seen, tokens, at, 1, added, share, threads)
        passed = _barrier(barrier, passed + threads)
        _bias(added[a:b], _vector(at[BIASES + 1], hidden))
        after = _vector(at[NORMS + 1], hidden)
        if len(after):
            ops.rms_norm_few(added[a:b], after, epsilon, added[a:b])
        _add(total[a:b], added[a:b])
        ops.rms_norm_few(total[a:b], _vector(at[NORMS + 2], hidden), epsilon, normed[a:b])
        passed = _barrier(barrier, passed + threads)
        _linear(normed, tokens, at, 2, both, share, threads)
        passed = _barrier(barrier, passed + threads)
        _bias(both[a:b], _vector(at[BIASES + 2], 2 * intermediate))
        ops.gate_few(both[a:b], gelu, product[a:b])
        passed = _barrier(barrier, passed + threads)
        _linear(product, tokens, at, 3, added, share, threads)
        passed = _barrier(barrier, passed + threads)
        _bias(added[a:b], _vector(at[BIASES + 3], hidden))
        after = _vector(at[NORMS + 3], hidden)
        if len(after):
            ops.rms_norm_few(added[a:b], after, epsilon, added[a:b])


@njit(parallel=True, nogil=True, cache=CACHE)
def decoder_layers(
    threads, state, total, added, weights, epsilon, gelu, rotations, interleaved, rope_of, key_starts, window_of, key_stop, keys, values,
    slots, seq_lens, block_table, tasks, scale, softcap, qkv, seen, both, product, normed,
):  # fmt: skip
    """Run the layers: `total` `[tokens, hidden]` is hidden state 0; `total + added` is the result, and both are overwritten.

    Args:
        threads: how many run it; state: zeros, int64 `[STATE]`. Where `state[STARTED]` is negative afterwards, nothing was run, because
            the threads did not run at the same time.
        weights: int64 `[layers, FIELDS]`, addresses of float32 numbers: norms `[hidden]` before and after attention, before and after the
            MLP; panels as in `ops.linear` and biases `[outputs]` of QKV, output, gate and up, down; head norms `[2, head_dim]`. 0: none. Then
            whether the panels are bfloat16.
        rotations: `[ropes, 2, tokens, pairs]`, cosines and sines; interleaved: bool `[ropes]`; rope_of: `[layers]`, -1: no rotation.
        key_starts: int32 `[windows, tokens]`; window_of: `[layers]`.
        keys, values: pages of all layers; slots, key_stop, seq_lens, block_table, tasks: as in `attention.attend`.
        qkv, seen, both, product, normed: memory for QKV `[tokens, heads, head_dim]`, attention `[rows, q_heads, head_dim]`, gate and up
            `[tokens, 2 * intermediate]`, their product `[rows, intermediate]` and a norm `[rows, hidden]`; `rows` are the tokens,
            padded to a multiple of `ops.ROWS`.
    """
    for share in prange(threads):
        _run_share(
            share, threads, state, total, added, weights, epsilon, gelu, rotations, interleaved, rope_of, key_starts, window_of, key_stop,
            keys, values, slots, seq_lens, block_table, tasks, scale, softcap, qkv, seen, both, product, normed,
        )  # fmt: skip
