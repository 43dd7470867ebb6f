"""Paged attention on a GPU: divide a batch between the prefill and the decode kernel, and write new tokens to their pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from . import prefill_simt
from .device import multiprocessors
from .dispatch import FEW_QUERIES, choose_path, prefill_kernel
from .tile_plan import cut

SPLIT_FIELDS = 12  # int32 fields of a KV split, the last three unused
_MAX_SPLITS = 256  # per sequence: one block combines them, sixteen at a time
_MIN_TILES = 4  # tiles of 64 keys per split: shorter splits cost more to combine than they gain (1 x 4096: 19 us with 2, 17 with 4)


@dataclass
class DevicePlan:
    """A batch's block table and the work of both kernels, on the device.

    Attributes:
        block_table: int32 `[sequences, max_pages]`; `host_block_table` is the same on the host.
        slots: int64 `[queries]`, the slot of each query's own key: page number times `page_size`, plus the offset in
            the page.
        cu_seqlens_q, seq_lens: cumulative numbers of queries and numbers of keys of the sequences, on the host.
        group: query heads per KV head.
        kv_splits: work of the decode kernel, for sequences whose queries times `group` are at most 16, or None. int32
            `[splits, 12]`: first query, number of queries, sequence, first key, end of keys, index of the split in its
            sequence, splits of the sequence, index of the sequence's first partial result, keys of the sequence; three
            fields are unused.
        partials: number of partial results.
        decode_rows: a sequence with at most so many queries times `group` is the decode kernel's; 0: all are the prefill kernel's.
        counters: int32 `[sequences * kv_heads]`, finished splits; zeros before and after each launch.
    """

    block_table: torch.Tensor
    slots: torch.Tensor
    cu_seqlens_q: np.ndarray
    seq_lens: np.ndarray
    host_block_table: np.ndarray
    page_size: int
    kv_heads: int
    group: int
    kv_splits: torch.Tensor | None = None
    partials: int = 0
    decode_rows: int = 16
    counters: torch.Tensor | None = None
    _tiles: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def tiles(self, rows: int) -> torch.Tensor | None:
        """Return tiles of `rows` queries of the sequences that have no KV splits, or None if all have some.

        They are the work of the prefill kernel: int32 `[tiles, 4]` on the device, as in `tile_plan.plan_tiles`, but the
            third number is the sequence. Cached by `rows`.
        """
        if rows not in self._tiles:
            tiles = [
                (start, count, sequence, keys)
                for sequence, (begin, stop, keys) in enumerate(self._sequences())
                if (stop - begin) * self.group > self.decode_rows
                for start, count in cut(begin, stop, rows)
            ]
            plan = np.asarray(tiles, np.int32).reshape(-1, 4)
            self._tiles[rows] = torch.from_numpy(plan).to(self.block_table.device) if tiles else None
        return self._tiles[rows]

    def _sequences(self) -> list[tuple[int, int, int]]:
        return list(
            zip(self.cu_seqlens_q[:-1].tolist(), self.cu_seqlens_q[1:].tolist(), self.seq_lens.tolist(), strict=True)
        )

    @cached_property
    def places(self) -> torch.Tensor:
        """The slots of all keys of the batch, sequence by sequence, int64, on the device.

        With them, keys and values are gathered for the plain kernel, which cannot read pages.
        """
        size = self.page_size
        places = [
            self.host_block_table[sequence][np.arange(keys) // size].astype(np.int64) * size + np.arange(keys) % size
            for sequence, keys in enumerate(self.seq_lens)
        ]
        return torch.from_numpy(np.concatenate(places)).to(self.block_table.device)


def plan_device(
    block_table: np.ndarray,
    cu_seqlens_q: np.ndarray,
    seq_lens: np.ndarray,
    slots: np.ndarray,
    pages,
    q_heads: int,
    invariant: str = "",
) -> DevicePlan:
    """Divide a batch between the decode and the prefill kernel and copy the plan to the device of `pages`.

    Arguments are those of `PagedPlan`; `slots` int64 `[queries]`.
    """
    device, group = pages.device, q_heads // pages.kv_heads
    device_table, device_slots = (torch.from_numpy(each).to(device) for each in (block_table, slots))
    plan = DevicePlan(
        device_table, device_slots, cu_seqlens_q, seq_lens, block_table, pages.page_size, pages.kv_heads, group
    )
    if invariant == "prefill":
        plan.decode_rows = 0
        return plan
    # Two blocks of the decode kernel run on a multiprocessor at once.
    blocks = 2 * multiprocessors(device.index or 0) if device.type == "cuda" else 1
    splits, plan.partials = plan_kv_splits(cu_seqlens_q, seq_lens, group, pages.kv_heads, 0 if invariant else blocks)
    if len(splits):
        plan.kv_splits = torch.from_numpy(splits).to(device)
        plan.counters = torch.zeros(len(seq_lens) * pages.kv_heads, dtype=torch.int32, device=device)
    return plan


def plan_kv_splits(
    cu_seqlens_q: np.ndarray, seq_lens: np.ndarray, group: int, kv_heads: int, blocks: int
) -> tuple[np.ndarray, int]:
    """Return the KV splits, int32 `[splits, 12]`, and the number of partial results.

    `blocks` is the number of blocks that the GPU runs at once; 0: a sequence is split without regard to the others.
    Fields are those of `DevicePlan.kv_splits`. The split size is the one that minimises the estimated time: the number
    of waves of blocks times the tiles (of 64 keys) of a split, plus two tiles of overhead per wave.
    """
    spans = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), seq_lens.tolist(), strict=True)
    short = [(number, *span) for number, span in enumerate(spans) if 0 < (span[1] - span[0]) * group <= 16]
    if not short:
        return np.zeros((0, SPLIT_FIELDS), np.int32), 0
    sizes = _alone(short) if not blocks else [_best_size(short, kv_heads, blocks)] * len(short)
    rows, partials = [], 0
    for size, (sequence, start, stop, keys) in zip(sizes, short, strict=True):
        splits = math.ceil(keys / (64 * size))
        split_keys = math.ceil(keys / 64 / splits) * 64
        splits = math.ceil(keys / split_keys)
        for split in range(splits):
            key_range = (split * split_keys, min((split + 1) * split_keys, keys))
            rows.append((start, stop - start, sequence, *key_range, split, splits, partials, keys, 0, 0, 0))
        partials += splits if splits > 1 else 0
    return np.asarray(rows, np.int32), partials


def _alone(short: list[tuple[int, int, int, int]]) -> list[int]:
    """Tiles per split of each sequence, by its own length."""
    return [max(_MIN_TILES, math.ceil(-(-keys // 64) / _MAX_SPLITS)) for *_, keys in short]


def _best_size(short: list[tuple[int, int, int, int]], kv_heads: int, blocks: int) -> int:
    """Tiles per split of all sequences: the number with the least estimated time."""
    tiles = np.array([-(-keys // 64) for *_, keys in short])
    total = int(tiles.sum()) * kv_heads
    best = (math.inf, 0)
    for waves in range(1, 9):
        size = max(-(-total // (blocks * waves)), _MIN_TILES, math.ceil(tiles.max() / _MAX_SPLITS))
        count = int((-(-tiles // size)).sum()) * kv_heads
        best = min(best, (-(-count // blocks) * (size + 2), size))
    return best[1]


def launch(q, keys, values, out, key_start, key_stop, plan, new, scale, softcap, path=None) -> None:
    """Launch `range_kernels.paged_attention` into `out` on the current stream.

    `keys`, `values`: the pages of one layer, `[pages, page_size, kv_heads, head_dim]`.

    `new` keys and values are written to their pages first; the decode kernel does that itself if it runs the whole
    batch.

    Raises:
        ValueError: the named path does not support this call.
    """
    work, keys, values = plan.device_plan, keys.flatten(0, 1), values.flatten(0, 1)
    # A prefill that may not depend on the other sequences takes the same kernel whatever their lengths.
    chosen = choose_path(q, scale, path, plan.max_seqlen_q if work.decode_rows else FEW_QUERIES)
    tensor_cores = chosen != "plain"
    long = plan.max_seqlen_q * work.group > work.decode_rows
    if new is not None and (long or not tensor_cores):
        for cache, rows in zip((keys, values), new, strict=True):
            cache.index_copy_(0, work.slots, rows)
        new = None
    if not tensor_cores:
        cu_seqlens_k = np.concatenate([[0], np.cumsum(plan.seq_lens)]).astype(np.int32)
        places = work.places
        prefill_simt.launch(
            q, keys[places], values[places], out, key_start, key_stop, plan.cu_seqlens_q, cu_seqlens_k, scale, softcap
        )
        return
    from . import decode_split_kv, prefill_sm80

    if work.kv_splits is not None:
        decode_split_kv.launch(q, keys, values, out, key_start, key_stop, work, new, scale, softcap)
    if long:
        kernel = prefill_kernel(chosen)(
            q.shape[2], prefill_sm80.DTYPES[q.dtype], softcap > 0, True, q.device.index or 0
        )
        tensors = (prefill_sm80.aligned(q), keys, values)
        tiles = work.tiles(kernel.rows)
        prefill_sm80.launch_tiles(
            kernel, tensors, out, key_start, key_stop, tiles, work.block_table, work.page_size, scale, softcap
        )
