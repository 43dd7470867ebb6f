"""Keys and values in pages, and attention over them: what chunked prefill, decode steps and shared prefixes run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .attention import cumulative, query_bounds

PAGE_SIZES = (32, 64, 128, 256)


class KVPages:
    """Keys and values of every layer of a model in pages of `page_size` tokens, on one device.

    Who owns which page is the caller's business; a sequence is a list of page numbers. On a GPU a page is
    `[page_size, kv_heads, head_dim]` in `dtype`; on the CPU it lies as the kernel reads it, in float32, whose values are those of
    `dtype`.

    Args:
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a page size that is not 32, 64, 128 or 256.
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
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={page_size}: pages hold {', '.join(map(str, PAGE_SIZES))} tokens")
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

    @staticmethod
    def bytes_of_page(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cpu: bool) -> int:
        """Memory of one page in all layers."""
        size = 4 if cpu else dtype.itemsize
        return 2 * layers * page_size * kv_heads * head_dim * size

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put tokens into pages of a layer.

        Args:
            slots: int64 `[tokens]`, page number times `page_size` plus place in the page.
            keys, values: `[tokens, kv_heads, head_dim]`.
        """
        shape = (len(slots), self.kv_heads, self.head_dim)
        if keys.shape != shape or values.shape != shape:
            raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected {shape}")
        if self.device.type == "cpu":
            from .cpu.launch import write_pages

            write_pages(self.keys[layer], self.values[layer], slots.numpy(), keys, values)
        else:
            self.keys[layer].flatten(0, 1)[slots] = keys
            self.values[layer].flatten(0, 1)[slots] = values


def paged_attention(
    q: torch.Tensor,
    pages: KVPages,
    layer: int,
    block_table: np.ndarray,
    cu_seqlens_q: np.ndarray,
    lengths_k: np.ndarray,
    *,
    low: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """`range_kernels.attention` with keys and values in pages: mixed batches of prefills, chunks and decode steps.

    Args:
        q: `[queries, q_heads, head_dim]` in the dtype and on the device of `pages`; the last positions of each sequence.
        block_table: int32 `[sequences, most pages]`: page of each stretch of `page_size` keys; entries past a sequence's keys
            are not read.
        cu_seqlens_q: `[sequences + 1]`, from 0 to `queries`.
        lengths_k: `[sequences]`, keys of each sequence, the new ones included (write them first).
        low, reach, window, softcap, scale: as in `range_kernels.attention`.

    Returns:
        `[queries, q_heads, head_dim]`. On the CPU a row is bit for bit the same whatever stands beside it in the batch and
        however its prompt was cut into chunks.

    Raises:
        ValueError: shapes or numbers do not fit, or a table entry that is read names no page.
    """
    if q.ndim != 3 or q.shape[2] != pages.head_dim or q.shape[1] % pages.kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)}: expected [queries, q_heads, {pages.head_dim}], q_heads a multiple of {pages.kv_heads}"
        )
    if q.dtype != pages.dtype or q.device.type != pages.device.type:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, the pages are {pages.dtype} on {pages.device}: make them equal"
        )
    lengths_q = cumulative("cu_seqlens_q", cu_seqlens_q, len(q))
    lengths_k = np.asarray(lengths_k, np.int32)
    block_table = np.ascontiguousarray(block_table, np.int32)
    _check_table(block_table, np.diff(lengths_q), lengths_k, pages)
    cu_seqlens_k = np.concatenate([[0], np.cumsum(lengths_k)]).astype(np.int32)
    low, reach = query_bounds(low, reach, lengths_q, cu_seqlens_k, window, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if q.device.type == "cpu":
        from .cpu.launch import attend_pages

        attend_pages(
            q,
            pages.keys[layer],
            pages.values[layer],
            out,
            low,
            reach,
            lengths_q,
            lengths_k,
            block_table,
            scale,
            softcap,
        )
    else:
        from .cuda.pages import launch

        launch(
            q,
            pages.keys[layer],
            pages.values[layer],
            out,
            low,
            reach,
            lengths_q,
            lengths_k,
            block_table,
            scale,
            softcap,
        )
    return out


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
