"""Reference implementations of `splice`, `attention` and `experts` in plain NumPy loops.

They define what the kernels compute, and tests compare the kernels with them; written for clarity, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .experts import ClippedGate


def splice(
    input_ids: np.ndarray,
    table: np.ndarray,
    items: Sequence[np.ndarray],
    ranges: Sequence[tuple[int, int]],
    *,
    offset: int = 0,
    scale: float = 1.0,
) -> np.ndarray:
    """Return hidden state 0 (the first decoder layer's input) of tokens `[offset, offset + tokens)` of a prompt.

    A token at a position inside `ranges[i]` gets its row of `items[i]`; any other token gets its row of `table` times
    `scale`.

    Args:
        input_ids: `[tokens]`, token ids.
        table: `[vocab, hidden]`, the embedding table.
        items: `items[i]` is `[stop_i - start_i, hidden]`, the rows to inject.
        ranges: half-open `(start, stop)`, in positions of the whole prompt.
        offset: prompt position of `input_ids[0]`.

    Returns:
        `[tokens, hidden]` in the dtype of `table`.
    """
    out = np.empty((len(input_ids), table.shape[1]), dtype=table.dtype)
    for token, token_id in enumerate(input_ids):
        out[token] = table[token_id] * scale
        for item, (start, stop) in zip(items, ranges, strict=True):
            if start <= offset + token < stop:
                out[token] = item[offset + token - start]
    return out


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    *,
    key_start: np.ndarray,
    key_stop: np.ndarray,
    scale: float,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Softmax attention over packed sequences with grouped-query heads, in float64.

    Shapes: `q [queries, q_heads, head_dim]`, `k` and `v` `[keys, kv_heads, head_dim]`, `cu_seqlens_q` and
    `cu_seqlens_k` `[sequences + 1]` (cumulative lengths, from 0), `key_start` and `key_stop` `[queries]`; returns
    float64 `[queries, q_heads, head_dim]`. A query attends to the keys `key_start <= j < key_stop`, counted from the
    first key of its own sequence, and gets zeros if there are none. Query head h reads KV head
    `h // (q_heads // kv_heads)`. `softcap` c > 0 replaces a score s by `c * tanh(s / c)` (Gemma 2, section 2).
    `sinks` `[q_heads]` are logits that take part in the softmax and have no value (gpt-oss).
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for sequence in range(len(cu_seqlens_q) - 1):
        first_key, end_key = cu_seqlens_k[sequence], cu_seqlens_k[sequence + 1]
        for query in range(cu_seqlens_q[sequence], cu_seqlens_q[sequence + 1]):
            begin = first_key + max(int(key_start[query]), 0)
            end = min(first_key + int(key_stop[query]), end_key)
            if begin >= end:
                continue
            for head in range(q.shape[1]):
                scores = k[begin:end, head // group] @ q[query, head] * scale
                if softcap > 0.0:
                    scores = softcap * np.tanh(scores / softcap)
                largest = scores.max() if sinks is None else max(scores.max(), sinks[head])
                weights = np.exp(scores - largest)
                total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head] - largest))
                out[query, head] = weights @ v[begin:end, head // group] / total
    return out


def experts(
    gate_up: np.ndarray,
    down: np.ndarray,
    x: np.ndarray,
    chosen: np.ndarray,
    weights: np.ndarray,
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    *,
    gelu: bool = False,
    clipped: ClippedGate | None = None,
    scaled_input: bool = False,
) -> np.ndarray:
    """`range_kernels.experts.Experts`, a row and an expert at a time; arguments as there, without checks."""
    out = np.zeros((len(x), down.shape[1]))
    for row, k in np.ndindex(chosen.shape):
        expert = chosen[row, k]
        both = gate_up[expert] @ (x[row] * (weights[row, k] if scaled_input else 1.0))
        both = both if gate_up_bias is None else both + gate_up_bias[expert]
        gate, up = np.split(both, 2)
        if clipped is not None:
            gate, up = np.minimum(both[::2], clipped.limit), both[1::2].clip(-clipped.limit, clipped.limit) + 1
            inner = gate / (1 + np.exp(-clipped.alpha * gate)) * up
        elif gelu:
            inner = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        else:
            inner = gate / (1 + np.exp(-gate)) * up
        one = down[expert] @ inner
        one = one if down_bias is None else one + down_bias[expert]
        out[row] += one if scaled_input else one * weights[row, k]
    return out


def causal_convolution(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`range_kernels.delta_net.causal_convolution` of one whole sequence `x` `[tokens, channels]`, in float64."""
    kernel = len(weight)
    padded = np.concatenate([np.zeros((kernel - 1, x.shape[1])), x])
    total = sum(weight[tap] * padded[tap : tap + len(x)] for tap in range(kernel))
    return total / (1 + np.exp(-total))


def gated_delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`range_kernels.delta_net.gated_delta_rule` of one whole sequence in float64: its result, and the state after it."""
    heads, key_dim = v.shape[1], q.shape[2]
    state, out = np.zeros((heads, key_dim, v.shape[2])), np.zeros(v.shape)
    q, k = (np.repeat(x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6), heads // q.shape[1], axis=1) for x in (q, k))
    for token in range(len(q)):
        for head in range(heads):
            decayed = state[head] * np.exp(decay[token, head])
            delta = (v[token, head] - decayed.T @ k[token, head]) * beta[token, head]
            state[head] = decayed + np.outer(k[token, head], delta)
            out[token, head] = state[head].T @ q[token, head] / np.sqrt(key_dim)
    return out, state
