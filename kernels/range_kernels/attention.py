"""The public attention call: checks, defaults, and the choice of a kernel by device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from .visibility import WindowRule, visible_keys

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Sequence[int] | torch.Tensor,
    cu_seqlens_k: Sequence[int] | torch.Tensor,
    *,
    reach: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    window: int | None = None,
    window_rule: WindowRule = "inside",
    softcap: float = 0.0,
    scale: float | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Softmax attention over packed sequences; query i sees the keys `low[i] <= j <= reach[i]` of its own sequence.

    Args:
        q: `[queries, q_heads, head_dim]`, float32, float16 or bfloat16.
        k, v: `[keys, kv_heads, head_dim]`, dtype and device of `q`; `q_heads` is a multiple of `kv_heads`.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths, `[sequences + 1]`, from 0 to `queries` and `keys`. A sequence with
            fewer queries than keys holds its last positions (a chunk of a prefill, a decode step).
        reach: int32 `[queries]`, last visible key, counted from the start of the sequence. None: the query's own
            position (causal). `visible_keys` makes it for bidirectional spans.
        low: int32 `[queries]`, first visible key. None: 0, or what `window` gives.
        window: keys a query sees backwards, itself included. With `low` given it must be None: state one of them.
        window_rule: "inside" keeps the window inside bidirectional spans too (Transformers); "union", where a span is
            seen whole in spite of the window (vLLM), needs the spans and is made by `visible_keys`: pass its `low`.
        softcap: c > 0 replaces a score s by `c * tanh(s / c)`.
        scale: factor on scores; None means `head_dim ** -0.5`.
        path: the kernel by name ("hopper", "tensor-core" or "plain" on a GPU), for tests and benchmarks; None chooses.

    Returns:
        `[queries, q_heads, head_dim]` in the dtype of `q`; zeros for a query that sees no key. Sums run in float32.

    Raises:
        ValueError: shapes, dtypes, devices or lengths do not fit; the message names the argument and the numbers.
    """
    _check_tensors(q, k, v)
    lengths_q, lengths_k = (
        cumulative("cu_seqlens_q", cu_seqlens_q, len(q)),
        cumulative("cu_seqlens_k", cu_seqlens_k, len(k)),
    )
    _check_lengths(lengths_q, lengths_k)
    if not 0.0 <= softcap <= 1e30:
        raise ValueError(f"softcap={softcap}: use a positive cap of at most 1e30, or 0 for none")
    if window_rule not in ("inside", "union"):
        raise ValueError(f"window_rule={window_rule!r}: use 'inside' (Transformers) or 'union' (vLLM)")
    if low is not None and window is not None:
        raise ValueError("low and window both given: low already states the first visible key, so leave window out")
    if window_rule != "inside" and low is None:
        raise ValueError(
            f"window_rule={window_rule!r} needs the spans: pass low=visible_keys(..., window_rule={window_rule!r})[0]"
        )
    low, reach = query_bounds(low, reach, lengths_q, lengths_k, window, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    numbers = (low, reach, lengths_q, lengths_k, scale, float(softcap))
    if q.device.type == "cuda":
        from .cuda.paths import launch as launch_cuda

        launch_cuda(q, k, v, out, *numbers, path=path)
        return out
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}: kernels exist for cpu and cuda")
    if path is not None:
        raise ValueError(f"path={path!r}: on the CPU there is one path, so leave it out")
    from .cpu.launch import attention as launch_cpu

    launch_cpu(q, k, v, out, *numbers)
    return out


def cumulative(name: str, lengths: Sequence[int] | torch.Tensor | np.ndarray, total: int) -> np.ndarray:
    """Cumulative lengths as int32, which must rise from 0 to `total`."""
    given = lengths.tolist() if isinstance(lengths, torch.Tensor | np.ndarray) else list(lengths)
    if not all(isinstance(length, int | np.integer) and not isinstance(length, bool) for length in given):
        raise ValueError(f"{name} must hold integers; got {given}")
    if len(given) < 2 or given[0] != 0 or given[-1] != total or any(a > b for a, b in itertools.pairwise(given)):
        raise ValueError(f"{name} must rise from 0 to {total}, one entry more than there are sequences; got {given}")
    return np.array(given, dtype=np.int32)


def _check_tensors(q, k, v) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected [tokens, heads, head_dim]")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: use float32, float16 or bfloat16")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: make them equal"
            )
    if k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be equal, with q's head_dim {q.shape[2]}")
    if q.shape[2] == 0:
        raise ValueError("head_dim is 0: q, k and v need at least one channel a head")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into groups over {k.shape[1]} KV heads")


def _check_lengths(lengths_q, lengths_k) -> None:
    if len(lengths_q) != len(lengths_k):
        raise ValueError(f"cu_seqlens_q states {len(lengths_q) - 1} sequences, cu_seqlens_k {len(lengths_k) - 1}")
    queries, keys = lengths_q[1:] - lengths_q[:-1], lengths_k[1:] - lengths_k[:-1]
    if (queries > keys).any():
        at = int((queries > keys).argmax())
        raise ValueError(f"sequence {at} has {queries[at]} queries but {keys[at]} keys: queries are its last positions")


def query_bounds(low, reach, lengths_q, lengths_k, window, q) -> tuple[torch.Tensor, torch.Tensor]:
    """`low` and `reach` as given, else those of causal attention inside `window`; on the device of `q`."""
    for name, given in (("low", low), ("reach", reach)):
        if given is not None and (given.shape != (q.shape[0],) or given.dtype != torch.int32):
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)}: expected int32 [{q.shape[0]}], one a query"
            )
    if low is None or reach is None:
        pairs = [
            visible_keys(int(keys), first=int(keys - queries), window=window)
            for queries, keys in zip(np.diff(lengths_q), np.diff(lengths_k), strict=True)
        ]
        low = torch.from_numpy(np.concatenate([pair[0] for pair in pairs])) if low is None else low
        reach = torch.from_numpy(np.concatenate([pair[1] for pair in pairs])) if reach is None else reach
    return low.to(q.device).contiguous(), reach.to(q.device).contiguous()
