"""Gated delta rule and causal convolution on the CPU in float32.

Tokens of a sequence run one after the other, in every chunk in the same order, so a token's result has the same bits in a prefill, in
any chunk of one, and in a decode step.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

CHANNELS = 64  # of the convolution, per task
TERMS = 16  # per partial sum over key channels; a sum of sums has less rounding error than one long sum


@njit(parallel=True, cache=True)
def convolve(x, weight, cu_seqlens, slots, fresh, states, out):
    """`range_kernels.delta_net.causal_convolution`: x, out [tokens, channels], weight [K, channels], states [slots, K - 1, channels]."""
    kernel, channels = weight.shape
    blocks = -(-channels // CHANNELS)
    for task in prange(len(slots) * blocks):
        sequence, start = task // blocks, task % blocks * CHANNELS
        stop = min(start + CHANNELS, channels)
        first, count = cu_seqlens[sequence], cu_seqlens[sequence + 1] - cu_seqlens[sequence]
        state = states[slots[sequence]]
        if fresh[sequence]:
            state[:, start:stop] = np.float32(0.0)
        for token in range(count):
            for channel in range(start, stop):
                total = np.float32(0.0)
                for tap in range(kernel):
                    at = token - kernel + 1 + tap
                    value = x[first + at, channel] if at >= 0 else state[at + kernel - 1, channel]
                    total += weight[tap, channel] * value
                out[first + token, channel] = total / (np.float32(1.0) + np.float32(math.exp(-total)))
        for row in range(kernel - 1):  # a later row is read before it is written
            at = count - kernel + 1 + row
            for channel in range(start, stop):
                state[row, channel] = x[first + at, channel] if at >= 0 else state[at + kernel - 1, channel]


@njit
def _unit(row, scale, out):
    """Write `row` divided by its length, times `scale`, to `out`."""
    squares = 0.0
    for channel in range(len(row)):
        squares += np.float64(row[channel]) * np.float64(row[channel])
    factor = np.float32(scale / math.sqrt(squares + 1e-6))
    for channel in range(len(row)):
        out[channel] = row[channel] * factor


@njit(parallel=True, cache=True)
def delta_rule(q, k, v, decay, beta, cu_seqlens, slots, fresh, states, out):
    """`range_kernels.delta_net.gated_delta_rule`; `states` is [slots, heads, key_dim, value_dim]."""
    heads, key_dim, value_dim = states.shape[1:]
    group = heads // q.shape[1]
    for task in prange(len(slots) * heads):
        sequence, head = task // heads, task % heads
        state = states[slots[sequence], head]
        if fresh[sequence]:
            state[:] = np.float32(0.0)
        query, key = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32)
        memory, part, delta = (
            np.empty(value_dim, np.float32),
            np.empty(value_dim, np.float32),
            np.empty(value_dim, np.float32),
        )
        for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
            _unit(q[token, head // group], 1.0 / math.sqrt(key_dim), query)
            _unit(k[token, head // group], 1.0, key)
            factor = np.float32(math.exp(decay[token, head]))
            memory[:] = np.float32(0.0)
            for begin in range(0, key_dim, TERMS):
                part[:] = np.float32(0.0)
                for i in range(begin, min(begin + TERMS, key_dim)):
                    for j in range(value_dim):
                        state[i, j] *= factor
                        part[j] += state[i, j] * key[i]
                for j in range(value_dim):
                    memory[j] += part[j]
            for j in range(value_dim):
                delta[j] = (v[token, head, j] - memory[j]) * beta[token, head]
            memory[:] = np.float32(0.0)
            for begin in range(0, key_dim, TERMS):
                part[:] = np.float32(0.0)
                for i in range(begin, min(begin + TERMS, key_dim)):
                    for j in range(value_dim):
                        state[i, j] += key[i] * delta[j]
                        part[j] += state[i, j] * query[i]
                for j in range(value_dim):
                    memory[j] += part[j]
            for j in range(value_dim):
                out[token, head, j] = memory[j]
