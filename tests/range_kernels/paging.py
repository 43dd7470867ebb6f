"""Stores the keys and values of packed sequences in KV cache pages."""

from __future__ import annotations

import numpy as np
import torch
from range_kernels import KVPages, PagedPlan, paged_attention

LAYER = 1  # of two layers, so that a kernel that ignores the layer fails


def put_in_pages(generator, k, v, cu_k, page_size, spare=3):
    """Returns pages in random order and the block table.

    On a GPU unused slots contain NaN; unused table entries contain an invalid page number.
    """
    lengths = np.diff(cu_k)
    counts = -(-lengths // page_size)
    numbers = generator.permutation(int(counts.sum()) + spare)
    table = np.full((len(lengths), int(counts.max()) + 1), 1 << 30, np.int32)
    at = 0
    for row, count in enumerate(counts):
        table[row, :count] = numbers[at : at + count]
        at += count
    pages = KVPages(2, len(numbers), page_size, k.shape[1], k.shape[2], k.dtype, k.device)
    if k.is_cuda:
        pages.keys.fill_(torch.nan)
        pages.values.fill_(torch.nan)
    plan = PagedPlan(table, cu_k, lengths, pages, k.shape[1])
    query = torch.zeros_like(k)
    paged_attention(query, pages, LAYER, plan, new=(k, v))  # a prefill of all tokens writes all keys and values
    return pages, table


def run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, new=None, **options):
    """Run `paged_attention` on packed queries."""
    plan = PagedPlan(table, cu_q, np.diff(cu_k), pages, q.shape[1])
    return paged_attention(q, pages, LAYER, plan, new=new, key_start=key_start, key_stop=key_stop, **options)


def last_keys(cu_q, cu_k):
    """Row indices of the queries' own keys: the last rows of each sequence."""
    return np.concatenate([np.arange(stop - count, stop) for stop, count in zip(cu_k[1:], np.diff(cu_q), strict=True)])
