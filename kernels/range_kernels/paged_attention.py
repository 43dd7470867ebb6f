"""Attention over a paged KV cache: for chunked prefill, decode steps and shared prefixes."""

from __future__ import annotations

import torch

from .kv_cache import KVPages
from .plans import CUDAGraphPlan, PagedPlan


def paged_attention(
    q: torch.Tensor,
    pages: KVPages,
    layer: int,
    plan: PagedPlan | CUDAGraphPlan,
    *,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_start: torch.Tensor | None = None,
    key_stop: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """`range_kernels.attention` over a paged KV cache, for mixed batches of prefills, chunks and decode steps.

    Args:
        q: `[queries, q_heads, head_dim]` in the dtype and on the device of `pages`.
        pages: the KV cache.
        layer: the layer of the cache to read and write.
        plan: the `PagedPlan` of this batch, or a `CUDAGraphPlan` into which it has been copied.
        new: keys and values of the queries' own tokens, `[queries, kv_heads, head_dim]` each, which are written into
            `pages` before they are read; None if they are already there.
        key_start, key_stop, window, softcap, scale, path: as in `range_kernels.attention`.
        sinks: float32 `[q_heads]`, a logit of each head that takes part in the softmax and has no value (gpt-oss); on the CPU only.

    Returns:
        `[queries, q_heads, head_dim]`. On the CPU a row is bit-identical regardless of the rest of the batch and of how
        its prompt was cut into chunks.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the plan was made for other pages or query heads.
    """
    if q.shape != (plan.queries, plan.q_heads, pages.head_dim):
        raise ValueError(f"q is {tuple(q.shape)}: the plan is for {(plan.queries, plan.q_heads, pages.head_dim)}")
    if q.dtype != pages.dtype or q.device.type != pages.device.type:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, the pages are {pages.dtype} on {pages.device}: make them equal"
        )
    for name, given in zip(("new keys", "new values"), new or (), strict=False):
        expected = (plan.queries, pages.kv_heads, pages.head_dim)
        if given.shape != expected or given.dtype != q.dtype or given.device != q.device:
            raise ValueError(
                f"{name} are {given.dtype} {tuple(given.shape)} on {given.device}: expected {q.dtype} {expected} on {q.device}"
            )
    if key_start is None or key_stop is None or key_start.device != q.device or key_stop.device != q.device:
        key_start, key_stop = plan.bounds(key_start, key_stop, window, q)
    for name, given in (("key_start", key_start), ("key_stop", key_stop)):
        if given.shape != q.shape[:1] or given.dtype != torch.int32 or not given.is_contiguous():
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}: expected int32 [{len(q)}], one per query")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plan.check(pages, scale, path)
    if sinks is not None and (
        sinks.shape != (plan.q_heads,) or sinks.dtype != torch.float32 or sinks.device != q.device
    ):
        raise ValueError(
            f"sinks are {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}: expected float32 [{plan.q_heads}] on {q.device}"
        )
    if sinks is not None and q.device.type != "cpu":
        raise ValueError("sinks: the GPU kernels have none; run on the CPU")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if q.device.type == "cpu":
        from .cpu.launch import attend_pages, write_pages

        assert isinstance(plan, PagedPlan)  # a CUDAGraphPlan is on a GPU
        if path is not None:
            raise ValueError(f"path={path!r}: the CPU has only one path, so leave it out")
        if new is not None:
            write_pages(pages.keys[layer], pages.values[layer], plan.slots, *new)
        attend_pages(q, pages.keys[layer], pages.values[layer], out, key_start, key_stop, plan, scale, softcap, sinks)
    else:
        from .cuda.paged_launch import launch

        launch(q, pages.keys[layer], pages.values[layer], out, key_start, key_stop, plan, new, scale, softcap, path)
    return out
