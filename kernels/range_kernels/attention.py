"""`attention`, the public call: it checks arguments, fills in defaults and launches the kernel for the device."""

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
    key_stop: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    window: int | None = None,
    window_rule: WindowRule = "inside",
    softcap: float = 0.0,
    scale: float | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Softmax attention over packed sequences; query i sees the keys `key_start[i] <= j < key_stop[i]` of its own sequence.

    Args:
        q: `[queries, q_heads, head_dim]`, float32, float16 or bfloat16.
        k, v: `[keys, kv_heads, head_dim]`, dtype and device of `q`; `q_heads` is a multiple of `kv_heads`.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths, `[sequences + 1]`, from 0 to `queries` and `keys`. A sequence with
            fewer queries than keys has queries at its last positions only (a chunk of a prefill, a decode step).
        key_start, key_stop: int32 `[queries]`, the half-open interval of visible keys, counted from the first key of
            the query's sequence. None: causal, from key 0 (or the first key of the window) up to the query itself.
            `visible_keys` computes both for prompts with bidirectional spans.
        window: size of a sliding window: number of keys that a query sees, itself included. Not allowed with
            `key_start`.
        window_rule: how a window applies to bidirectional spans. "inside": also within a span (Transformers). "union":
            a span stays visible as a whole (vLLM); this depends on the spans, so it requires `key_start` from
            `visible_keys`.
        softcap: c > 0 replaces a score s by `c * tanh(s / c)`; 0 is none.
        scale: factor on scores; None means `head_dim ** -0.5`.
        path: the GPU kernel to run, "hopper", "tensor-core" or "plain", for tests and benchmarks; None chooses the
            fastest that supports the call.

    Returns:
        `[queries, q_heads, head_dim]` in the dtype of `q`; zeros for a query that sees no key. Sums run in float32.

    Raises:
        ValueError: shapes, dtypes, devices or lengths do not fit; the message names the argument and the numbers.
    """
    _check_tensors(q, k, v)
    offsets_q = cumulative("cu_seqlens_q", cu_seqlens_q, len(q))
    offsets_k = cumulative("cu_seqlens_k", cu_seqlens_k, len(k))
    _check_offsets(offsets_q, offsets_k)
    if not 0.0 <= softcap <= 1e30:
        raise ValueError(f"softcap={softcap}: use a positive cap of at most 1e30, or 0 for none")
    if window_rule not in ("inside", "union"):
        raise ValueError(f"window_rule={window_rule!r}: use 'inside' (Transformers) or 'union' (vLLM)")
    if key_start is not None and window is not None:
        raise ValueError(
            "key_start and window both given: key_start already gives the first visible key, so leave window out"
        )
    if window_rule != "inside" and key_start is None:
        raise ValueError(
            f"window_rule={window_rule!r} needs the spans: pass key_start=visible_keys(..., window_rule={window_rule!r})[0]"
        )
    key_start, key_stop = query_bounds(key_start, key_stop, offsets_q, offsets_k, window, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    numbers = (key_start, key_stop, offsets_q, offsets_k, scale, float(softcap))
    if q.device.type == "cuda":
        from .cuda.dispatch import launch as launch_cuda

        launch_cuda(q, k, v, out, *numbers, path=path)
        return out
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}: kernels exist for cpu and cuda")
    if path is not None:
        raise ValueError(f"path={path!r}: the CPU has only one path, so leave it out")
    from .cpu.launch import attention as launch_cpu

    launch_cpu(q, k, v, out, *numbers)
    return out


def cumulative(name: str, lengths: Sequence[int] | torch.Tensor | np.ndarray, total: int) -> np.ndarray:
    """Return the cumulative lengths `[sequences + 1]` as int32; `name` is the argument's name in messages.

    Raises:
        ValueError: they are not integers that rise from 0 to `total` (equal neighbours are allowed).
    """
    given = lengths.tolist() if isinstance(lengths, torch.Tensor | np.ndarray) else list(lengths)
    if not all(isinstance(length, int | np.integer) and not isinstance(length, bool) for length in given):
        raise ValueError(f"{name} must contain integers; got {given}")
    if len(given) < 2 or given[0] != 0 or given[-1] != total or any(a > b for a, b in itertools.pairwise(given)):
        raise ValueError(f"{name} must rise from 0 to {total}, with one entry more than sequences; got {given}")
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
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must have the same shape and q's head_dim {q.shape[2]}"
        )
    if q.shape[2] == 0:
        raise ValueError("head_dim is 0: q, k and v need at least one channel per head")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into groups over {k.shape[1]} KV heads")


def _check_offsets(cu_seqlens_q, cu_seqlens_k) -> None:
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q) - 1} sequences, cu_seqlens_k {len(cu_seqlens_k) - 1}")
    queries, keys = cu_seqlens_q[1:] - cu_seqlens_q[:-1], cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    if (queries > keys).any():
        at = int((queries > keys).argmax())
        raise ValueError(
            f"sequence {at} has {queries[at]} queries but {keys[at]} keys: it needs at least one key per query"
        )


def query_bounds(key_start, key_stop, cu_seqlens_q, cu_seqlens_k, window, q) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `key_start` and `key_stop`, int32 `[queries]`, contiguous and on the device of `q`.

    A bound that is None is replaced by that of causal attention, restricted to a sliding window of `window` tokens if that is
    given. A given bound is not restricted to the window.

    Args:
        key_start, key_stop: int32 `[queries]`, or None.
        cu_seqlens_q, cu_seqlens_k: NumPy arrays `[sequences + 1]`, cumulative numbers of queries and of keys.
        q: `[queries, heads, head_dim]`; only its length and device are used.

    Raises:
        ValueError: a given bound is not int32 `[queries]`.
    """
    for name, given in (("key_start", key_start), ("key_stop", key_stop)):
        if given is not None and (given.shape != (q.shape[0],) or given.dtype != torch.int32):
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)}: expected int32 [{q.shape[0]}], one per query"
            )
    if key_start is None or key_stop is None:
        pairs = [
            visible_keys(int(keys), first=int(keys - queries), window=window)
            for queries, keys in zip(np.diff(cu_seqlens_q), np.diff(cu_seqlens_k), strict=True)
        ]
        key_start = torch.from_numpy(np.concatenate([pair[0] for pair in pairs])) if key_start is None else key_start
        key_stop = torch.from_numpy(np.concatenate([pair[1] for pair in pairs])) if key_stop is None else key_stop
    return key_start.to(q.device).contiguous(), key_stop.to(q.device).contiguous()
