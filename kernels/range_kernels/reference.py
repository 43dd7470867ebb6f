"""Reference implementations of `splice` and `attention` in plain NumPy loops.

They define what the kernels compute, and tests compare the kernels with them; written for clarity, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
) -> np.ndarray:
    """Softmax attention over packed sequences with grouped-query heads, in float64.

    Shapes: `q [queries, q_heads, head_dim]`, `k` and `v` `[keys, kv_heads, head_dim]`, `cu_seqlens_q` and
    `cu_seqlens_k` `[sequences + 1]` (cumulative lengths, from 0), `key_start` and `key_stop` `[queries]`; returns
    float64 `[queries, q_heads, head_dim]`. A query attends to the keys `key_start <= j < key_stop`, counted from the
    first key of its own sequence, and gets zeros if there are none. Query head h reads KV head
    `h // (q_heads // kv_heads)`. `softcap` c > 0 replaces a score s by `c * tanh(s / c)` (Gemma 2, section 2).
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
                weights = np.exp(scores - scores.max())
                out[query, head] = weights @ v[begin:end, head // group] / weights.sum()
    return out
