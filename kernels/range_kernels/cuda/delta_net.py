"""Gated delta rule and causal convolution on any GPU, plain Numba, in float32.

convolution   a thread per sequence and channel
delta rule    a block per sequence and head; each thread keeps one column of the state, key_dim numbers
"""

from __future__ import annotations

import math

import torch
from numba import cuda, float32

from .device import as_array, stream

MAX_KEY_DIM = 256
MAX_VALUE_DIM = 1024
_THREADS = 128


@cuda.jit
def _convolve(x, weight, cu_seqlens, slots, fresh, states, out):
    sequence = cuda.blockIdx.x
    channel = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    kernel, channels = weight.shape
    if channel >= channels:
        return
    first = cu_seqlens[sequence]
    count = cu_seqlens[sequence + 1] - first
    slot = slots[sequence]
    if fresh[sequence]:
        for row in range(kernel - 1):
            states[slot, row, channel] = float32(0.0)
    for token in range(count):
        total = float32(0.0)
        for tap in range(kernel):
            at = token - kernel + 1 + tap
            value = x[first + at, channel] if at >= 0 else states[slot, at + kernel - 1, channel]
            total += weight[tap, channel] * value
        out[first + token, channel] = total / (float32(1.0) + float32(math.exp(-total)))
    for row in range(kernel - 1):
        at = count - kernel + 1 + row
        states[slot, row, channel] = x[first + at, channel] if at >= 0 else states[slot, at + kernel - 1, channel]


@cuda.jit
def _delta_rule(q, k, v, decay, beta, cu_seqlens, slots, fresh, states, out):
    sequence, head, j = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    heads, key_dim, value_dim = states.shape[1], states.shape[2], states.shape[3]
    key_head = head // (heads // q.shape[1])
    slot = slots[sequence]
    query = cuda.shared.array(MAX_KEY_DIM, float32)
    key = cuda.shared.array(MAX_KEY_DIM, float32)
    factors = cuda.shared.array(2, float32)
    column = cuda.local.array(MAX_KEY_DIM, float32)
    if j < value_dim:
        for i in range(key_dim):
            column[i] = float32(0.0) if fresh[sequence] else states[slot, head, i, j]
    for token in range(cu_seqlens[sequence], cu_seqlens[sequence + 1]):
        for i in range(j, key_dim, cuda.blockDim.x):
            query[i] = q[token, key_head, i]
            key[i] = k[token, key_head, i]
        cuda.syncthreads()
        if j < 2:
            squares = float32(0.0)
            for i in range(key_dim):
                value = query[i] if j == 0 else key[i]
                squares += value * value
            factors[j] = float32(1.0) / float32(math.sqrt(squares + float32(1e-6)))
        cuda.syncthreads()
        if j < value_dim:
            factor = float32(math.exp(decay[token, head]))
            memory = float32(0.0)
            for i in range(key_dim):
                column[i] *= factor
                memory += column[i] * (key[i] * factors[1])
            delta = (v[token, head, j] - memory) * beta[token, head]
            seen = float32(0.0)
            scale = factors[0] / float32(math.sqrt(float32(key_dim)))
            for i in range(key_dim):
                column[i] += key[i] * factors[1] * delta
                seen += column[i] * (query[i] * scale)
            out[token, head, j] = seen
        cuda.syncthreads()
    if j < value_dim:
        for i in range(key_dim):
            states[slot, head, i, j] = column[i]


def launch_convolution(x, weight, cu_seqlens, slots, fresh, states, out) -> None:
    """`range_kernels.delta_net.causal_convolution` of float32 tensors into `out`."""
    arrays = [as_array(each) for each in (x, weight, cu_seqlens, slots, fresh, states, out)]
    _convolve[(len(slots), -(-x.shape[1] // _THREADS)), _THREADS, stream(x)](*arrays)


def launch_delta_rule(q, k, v, decay, beta, cu_seqlens, slots, fresh, states, out: torch.Tensor) -> None:
    """`range_kernels.delta_net.gated_delta_rule` of float32 tensors into `out`.

    Raises:
        ValueError: a head is wider than the kernel takes.
    """
    heads, key_dim, value_dim = states.shape[1:]
    if key_dim > MAX_KEY_DIM or value_dim > MAX_VALUE_DIM:
        raise ValueError(
            f"heads of {key_dim} and {value_dim} channels: the CUDA kernel takes up to {MAX_KEY_DIM} key and {MAX_VALUE_DIM} value channels"
        )
    threads = max(-(-value_dim // 32) * 32, 32)
    arrays = [as_array(each) for each in (q, k, v, decay, beta, cu_seqlens, slots, fresh, states, out)]
    _delta_rule[(len(slots), heads), threads, stream(q)](*arrays)
