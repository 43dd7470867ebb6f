"""The paged KV cache: keys and values of every layer in pages of a fixed number of tokens."""

from __future__ import annotations

from typing import Any

import torch

PAGE_SIZES = (16, 32, 64, 128, 256)


class KVPages:
    """Keys and values of every layer of a model in pages of `page_size` tokens, on one device.

    The caller assigns pages to sequences: a sequence is a list of page numbers, the same in every layer.

    Args:
        layers, pages, kv_heads, head_dim: sizes; `pages` is the number of pages per layer.
        page_size: tokens per page.
        dtype: float32, float16 or bfloat16.

    Attributes:
        keys, values: on a GPU tensors `[layers, pages, page_size, kv_heads, head_dim]` in `dtype`, uninitialised. On
            the CPU float32 NumPy arrays in the layout of `cpu/attention.py`, zeros; float32 represents the values of
            `dtype` exactly.

    Raises:
        ValueError: the page size is not 32, 64, 128 or 256 (or 16 on a GPU), or another size is below 1.
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
            raise ValueError(f"page_size={page_size}: use one of {', '.join(map(str, sizes))} tokens")
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
    def layout(self) -> tuple[int, int]:
        """`(page_size, kv_heads)`. An attention plan (`plans.py`) made for one `KVPages` can be used with any other of equal layout."""
        return self.page_size, self.kv_heads

    @staticmethod
    def bytes_of_page(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cpu: bool) -> int:
        """Return the bytes of one page, keys and values, in all layers; on the CPU (`cpu`) a number takes 4 bytes."""
        size = 4 if cpu else dtype.itemsize
        return 2 * layers * page_size * kv_heads * head_dim * size


def check_layout(plan: tuple[int, int], pages: tuple[int, int]) -> None:
    """Raise ValueError if the layout that a plan was made for is not that of the pages; both are `KVPages.layout`."""
    if plan != pages:
        raise ValueError(
            f"pages of (tokens, KV heads) {pages}: this plan is for {plan}; make one with the pages that the call reads"
        )
