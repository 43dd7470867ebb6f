"""Keys and values in pages, and attention over them: what chunked prefill, decode steps and shared prefixes run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .attention import cumulative, query_bounds

if TYPE_CHECKING:
    from .cuda.pages import DevicePlan
    from .standing import StandingPlan

PAGE_SIZES = (16, 32, 64, 128, 256)


class KVPages:
    """Keys and values of every layer of a model in pages of `page_size` tokens, on one device.

    Who owns which page is the caller's business; a sequence is a list of page numbers. On a GPU a page is
    `[page_size, kv_heads, head_dim]` in `dtype`; on the CPU it lies as the kernel reads it, in float32, whose values are those of
    `dtype`.

    Args:
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a page size that is not 32, 64, 128 or 256, or 16 on a GPU.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = PAGE_SIZES[1:] if torch.device(device).type == "cpu" else PAGE_SIZES
        if page_size not in sizes:
            raise ValueError(f"page_size={page_size}: pages hold {', '.join(map(str, sizes))} tokens")
        if min(layers, pages, kv_heads, head_dim) < 1:
            raise ValueError(
                f"layers={layers}, pages={pages}, kv_heads={kv_heads}, head_dim={head_dim}: all must be at least 1"
            )
        self.page_size, self.pages = page_size, pages
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cpu":
            from .cpu.launch import empty_pages

            self.keys: Any
            self.values: Any
            self.keys, self.values = empty_pages(layers, pages, page_size, kv_heads, head_dim)
        else:
            shape = (layers, pages, page_size, kv_heads, head_dim)
            self.keys = torch.empty(shape, dtype=dtype, device=device)
            self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def kind(self) -> tuple[int, int]:
        """Tokens of a page and KV heads: what a plan depends on."""
        return self.page_size, self.kv_heads

    @staticmethod
    def bytes_of_page(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cpu: bool) -> int:
        """Memory of one page in all layers."""
        size = 4 if cpu else dtype.itemsize
        return 2 * layers * page_size * kv_heads * head_dim * size


class PagedPlan:
    """Which pages a batch reads and how its work is cut up: checked and made once a step, used by every layer.

    On a GPU, calls with one plan must follow each other (one stream, or streams that wait): they count in its memory.

    Args:
        block_table: int32 `[sequences, most pages]`: page of each stretch of `page_size` keys; entries past a sequence's keys
            are not read.
        cu_seqlens_q: `[sequences + 1]`, from 0 to the number of queries, which are the last positions of each sequence.
        lengths_k: `[sequences]`, keys of each sequence, the new ones included.
        pages: where the keys lie.
        q_heads: a multiple of the pages' KV heads.

    Raises:
        ValueError: numbers do not fit, or an entry that is read names no page.
    """

    def __init__(
        self,
        block_table: np.ndarray,
        cu_seqlens_q: Sequence[int] | np.ndarray,
        lengths_k: Sequence[int] | np.ndarray,
        pages: KVPages,
        q_heads: int,
    ) -> None:
        if q_heads < 1 or q_heads % pages.kv_heads:
            raise ValueError(f"{q_heads} query heads do not divide into groups over {pages.kv_heads} KV heads")
        self.queries, self.q_heads, self.kind = int(cu_seqlens_q[-1]), q_heads, pages.kind
        self.cu_queries = cumulative("cu_seqlens_q", cu_seqlens_q, self.queries)
        self.lengths = np.ascontiguousarray(lengths_k, np.int32)
        self.block_table = np.ascontiguousarray(block_table, np.int32)
        _check_table(self.block_table, np.diff(self.cu_queries), self.lengths, pages)
        self.most_keys, self.most_queries = int(self.lengths.max()), int(np.diff(self.cu_queries).max())
        self.device_plan: DevicePlan | None = None
        slots = _last_slots(self.block_table, np.diff(self.cu_queries), self.lengths, pages.page_size)
        if pages.device.type == "cpu":
            from .cpu.launch import plan_tasks

            self.slots = slots
            self.tasks = plan_tasks(self.cu_queries, self.lengths, q_heads // pages.kv_heads, pages.kv_heads)
        else:
            from .cuda.pages import plan_device

            self.device_plan = plan_device(self.block_table, self.cu_queries, self.lengths, slots, pages, q_heads)

    @property
    def items(self) -> int:
        """Pieces of work of the decode kernel on a GPU: stretches of the keys of sequences with few queries."""
        work = self.device_plan
        return 0 if work is None or work.items is None else len(work.items)

    def bounds(
        self, low: torch.Tensor | None, reach: torch.Tensor | None, window: int | None, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key of each query, on its device: as given, else those of causal attention inside `window`."""
        cu_keys = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return query_bounds(low, reach, self.cu_queries, cu_keys, window, q)

    def check(self, pages: KVPages, scale: float, path: str | None) -> None:
        """Raises ValueError for pages of another kind than those that the plan was made for."""
        check_kind(self.kind, pages.kind)


def paged_attention(
    q: torch.Tensor,
    pages: KVPages,
    layer: int,
    plan: PagedPlan | StandingPlan,
    *,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    low: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """`range_kernels.attention` with keys and values in pages: mixed batches of prefills, chunks and decode steps.

    Args:
        q: `[queries, q_heads, head_dim]` in the dtype and on the device of `pages`.
        layer: whose pages to read.
        new: keys and values of the queries' own tokens, `[queries, kv_heads, head_dim]`, written into their pages first; None
            where they are there.
        low, reach, window, softcap, scale, path: as in `range_kernels.attention`.

    Returns:
        `[queries, q_heads, head_dim]`. On the CPU a row is bit for bit the same whatever stands beside it in the batch and
        however its prompt was cut into chunks.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
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
    if low is None or reach is None or low.device != q.device or reach.device != q.device:
        low, reach = plan.bounds(low, reach, window, q)
    for name, given in (("low", low), ("reach", reach)):
        if given.shape != q.shape[:1] or given.dtype != torch.int32 or not given.is_contiguous():
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}: expected int32 [{len(q)}], one a query")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plan.check(pages, scale, path)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if q.device.type == "cpu":
        from .cpu.launch import attend_pages, write_pages

        assert isinstance(plan, PagedPlan)  # a standing one is on a GPU
        if path is not None:
            raise ValueError(f"path={path!r}: on the CPU there is one path")
        if new is not None:
            write_pages(pages.keys[layer], pages.values[layer], plan.slots, *new)
        attend_pages(q, pages.keys[layer], pages.values[layer], out, low, reach, plan, scale, softcap)
    else:
        from .cuda.pages import launch

        launch(q, pages.keys[layer], pages.values[layer], out, low, reach, plan, new, scale, softcap, path)
    return out


def check_kind(plan: tuple[int, int], pages: tuple[int, int]) -> None:
    """Raises ValueError where a plan is not for such pages (`KVPages.kind`)."""
    if plan != pages:
        raise ValueError(
            f"pages of (tokens, KV heads) {pages}: this plan is for {plan}; make one with the pages that the call reads"
        )


def _check_table(table: np.ndarray, queries: np.ndarray, keys: np.ndarray, pages: KVPages) -> None:
    if keys.shape != queries.shape or (queries > keys).any():
        raise ValueError(
            f"lengths_k {keys.tolist()} for sequences of {queries.tolist()} queries: a sequence has at least as many keys"
        )
    needed = -(-keys // pages.page_size)
    if table.ndim != 2 or len(table) != len(keys) or (len(needed) and needed.max() > table.shape[1]):
        raise ValueError(f"block_table is {table.shape}: {len(keys)} sequences need up to {needed.max()} pages each")
    read = table[np.arange(table.shape[1]) < needed[:, None]]
    if len(read) and not 0 <= read.min() <= read.max() < pages.pages:
        raise ValueError(f"block_table names page {read.min()} to {read.max()}: there are {pages.pages}")


def _last_slots(table: np.ndarray, queries: np.ndarray, keys: np.ndarray, page_size: int) -> np.ndarray:
    """Where the last `queries` keys of each sequence lie: page times `page_size` plus place in the page, int64."""
    sequence = np.repeat(np.arange(len(queries)), queries)
    place = np.arange(len(sequence)) + np.repeat(keys - np.cumsum(queries), queries)
    return table[sequence, place // page_size].astype(np.int64) * page_size + place % page_size
