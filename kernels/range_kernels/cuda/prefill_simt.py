"""Attention on any GPU, plain Numba: one block per (query, head), an online softmax over KEYS keys at a time.

    each thread: score of one key -> block maximum -> exp -> each thread: some channels of sum(weight * V)

This is the path "plain": for calls that no faster path supports, and the only one that the simulator can run. Online
softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import cuda, float32, int32

from .device import as_array, stream
from .ptx import bits_from_float, float_from_bits

KEYS = 128  # keys per iteration, and threads per block
MAX_HEAD_DIM = 256
_MASKED = -1e30


@cuda.jit(device=True)
def _plain_load(value):
    return float32(value)


@cuda.jit(device=True)
def _plain_store(value):
    return value


@cuda.jit(device=True)
def _bfloat16_load(bits):
    return float_from_bits(int32(int32(bits) << int32(16)))


@cuda.jit(device=True)
def _bfloat16_store(value):
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.int64(bits_from_float(value))
    if value != value:
        return np.int16(0x7FC0)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = rounded & 0xFFFF
    return np.int16(rounded - 0x10000 if rounded >= 0x8000 else rounded)


@cache
def _kernel(bfloat16: bool):
    """Return the kernel for float32 and float16 arrays or, if `bfloat16`, for bfloat16 arrays passed as int16."""
    load, store = (_bfloat16_load, _bfloat16_store) if bfloat16 else (_plain_load, _plain_store)

    @cuda.jit
    def attend(q, k, v, out, key_start, key_stop, key_bounds, scale, softcap):
        query, head, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        head_dim = q.shape[2]
        kv_head = head // (q.shape[1] // k.shape[1])
        row = cuda.shared.array(MAX_HEAD_DIM, float32)
        weights = cuda.shared.array(KEYS, float32)
        block_max = cuda.shared.array(KEYS, float32)
        for channel in range(thread, head_dim, KEYS):
            row[channel] = load(q[query, head, channel])
        offset = key_bounds[query, 0]
        begin = offset + max(key_start[query], 0)
        end = min(offset + key_stop[query], key_bounds[query, 1])
        row_max, row_sum = float32(_MASKED), float32(0.0)
        first_sum, second_sum = float32(0.0), float32(0.0)  # channels `thread` and `thread + KEYS`
        cuda.syncthreads()
        for key0 in range(begin, end, KEYS):
            score = float32(_MASKED)
            if key0 + thread < end:
                score = float32(0.0)
                for channel in range(head_dim):
                    score += row[channel] * load(k[key0 + thread, kv_head, channel])
                score *= scale
                if softcap > 0.0:
                    score = softcap * math.tanh(score / softcap)
            block_max[thread] = score
            cuda.syncthreads()
            step = KEYS // 2
            while step > 0:
                if thread < step:
                    block_max[thread] = max(block_max[thread], block_max[thread + step])
                cuda.syncthreads()
                step //= 2
            new_max = max(row_max, block_max[0])
            rescale = float32(math.exp(row_max - new_max))
            row_max = new_max
            weights[thread] = float32(math.exp(score - new_max)) if key0 + thread < end else float32(0.0)
            cuda.syncthreads()
            # Sum each tile separately: one sum over thousands of keys has ten times the rounding error (fuzz, 9000 keys).
            tile_sum, tile_first, tile_second = float32(0.0), float32(0.0), float32(0.0)
            for j in range(min(KEYS, end - key0)):
                tile_sum += weights[j]
                if thread < head_dim:
                    tile_first += weights[j] * load(v[key0 + j, kv_head, thread])
                if thread + KEYS < head_dim:
                    tile_second += weights[j] * load(v[key0 + j, kv_head, thread + KEYS])
            row_sum = row_sum * rescale + tile_sum
            first_sum = first_sum * rescale + tile_first
            second_sum = second_sum * rescale + tile_second
            cuda.syncthreads()
        if begin >= end:
            row_sum = float32(1.0)
        if thread < head_dim:
            out[query, head, thread] = store(first_sum / row_sum)
        if thread + KEYS < head_dim:
            out[query, head, thread + KEYS] = store(second_sum / row_sum)

    return attend


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    key_start: torch.Tensor,
    key_stop: torch.Tensor,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    scale: float,
    softcap: float,
) -> None:
    """Launch `range_kernels.attention` into `out` on the current stream; the cumulative lengths are on the host.

    Raises:
        ValueError: the head size exceeds `MAX_HEAD_DIM`.
    """
    queries, q_heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim}: the plain CUDA kernel takes up to {MAX_HEAD_DIM}")
    bounds = np.stack([cu_seqlens_k[:-1], cu_seqlens_k[1:]], axis=1).astype(np.int32)
    key_bounds = torch.from_numpy(np.repeat(bounds, np.diff(cu_seqlens_q), axis=0)).to(q.device, non_blocking=True)
    arrays = [as_array(x) for x in (q, k, v, out, key_start, key_stop, key_bounds)]
    kernel = _kernel(q.dtype is torch.bfloat16)
    kernel[(queries, q_heads), KEYS, stream(q)](*arrays, np.float32(scale), np.float32(softcap))
