"""Paged attention on a GPU: divide a batch between the prefill and the decode kernel, and write new tokens to their pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from . import prefill_simt
from .device import multiprocessors
from .dispatch import choose_path, prefill_kernel
from .tile_plan import cut

SPLIT_FIELDS = 12  # int32 fields of a KV split, the last three unused
_MAX_SPLITS = 256  # per sequence: one block combines them, sixteen at a time
_MIN_TILES = 4  # tiles of 64 keys per split: shorter splits cost more to combine than they gain (1 x 4096: 19 us with 2, 17 with 4)


@dataclass
class DevicePlan:
    """A batch's block table and the work of both kernels, on the device.

    Attributes:
        block_table: int32 `[sequences, max_pages]`.
        slots: int64 `[queries]`, the slots of the last keys of each sequence.
        kv_splits: int32 `[n, 12]`: first query, queries, sequence, first key, end of keys, number of the split, splits of the sequence,
            index of its first partial result, keys of the sequence. For sequences whose queries times `group` are at most 16.
        partials: number of partial results; counters: int32 `[sequences * kv_heads]`, zeros before and after each launch.
        tiles: those of the other sequences, as in `tile_plan.plan_tiles`, but the third number is the sequence.
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
    counters: torch.Tensor | None = None
    _tiles: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def tiles(self, rows: int) -> torch.Tensor | None:
        """Return tiles of `rows` queries, or None if every sequence is short."""
        if rows not in self._tiles:
            tiles = [
                (start, count, sequence, keys)
                for sequence, (begin, stop, keys) in enumerate(self._sequences())
                if (stop - begin) * self.group > 16
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
        """The slot of every key of the batch, sequence after sequence, int64: for the plain kernel, which cannot read pages."""
        size = self.page_size
        places = [
            self.host_block_table[sequence][np.arange(keys) // size].astype(np.int64) * size + np.arange(keys) % size
            for sequence, keys in enumerate(self.seq_lens)
        ]
        return torch.from_numpy(np.concatenate(places)).to(self.block_table.device)


def plan_device(
    block_table: np.ndarray, cu_seqlens_q: np.ndarray, seq_lens: np.ndarray, slots: np.ndarray, pages, q_heads: int
) -> DevicePlan:
    """Divide a batch into work and copy the plan to the device."""
    device, group = pages.device, q_heads // pages.kv_heads
    device_table, device_slots = (torch.from_numpy(each).to(device) for each in (block_table, slots))
    plan = DevicePlan(
        device_table, device_slots, cu_seqlens_q, seq_lens, block_table, pages.page_size, pages.kv_heads, group
    )
    # Two blocks of the decode kernel run on a multiprocessor at once.
    blocks = 2 * multiprocessors(device.index or 0) if device.type == "cuda" else 1
    splits, plan.partials = plan_kv_splits(cu_seqlens_q, seq_lens, group, pages.kv_heads, blocks)
    if len(splits):
        plan.kv_splits = torch.from_numpy(splits).to(device)
        plan.counters = torch.zeros(len(seq_lens) * pages.kv_heads, dtype=torch.int32, device=device)
    return plan


def plan_kv_splits(
    cu_seqlens_q: np.ndarray, seq_lens: np.ndarray, group: int, kv_heads: int, blocks: int
) -> tuple[np.ndarray, int]:
    """Return the KV splits, int32 `[n, 12]`, and the number of partial results, for a GPU that runs `blocks` blocks at once.

    The split size minimises the time of all waves of blocks, counted in tiles, with an overhead of two tiles per wave.
    """
    spans = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), seq_lens.tolist(), strict=True)
    short = [(number, *span) for number, span in enumerate(spans) if 0 < (span[1] - span[0]) * group <= 16]
    if not short:
        return np.zeros((0, SPLIT_FIELDS), np.int32), 0
    tiles = np.array([-(-keys // 64) for *_, keys in short])
    total = int(tiles.sum()) * kv_heads
    best = (math.inf, 0)
    for waves in range(1, 9):
        size = max(-(-total // (blocks * waves)), _MIN_TILES, math.ceil(tiles.max() / _MAX_SPLITS))
        count = int((-(-tiles // size)).sum()) * kv_heads
        best = min(best, (-(-count // blocks) * (size + 2), size))
    size = best[1]
    rows, partials = [], 0
    for sequence, start, stop, keys in short:
        splits = math.ceil(keys / (64 * size))
        split_keys = math.ceil(keys / 64 / splits) * 64
        splits = math.ceil(keys / split_keys)
        for split in range(splits):
            key_range = (split * split_keys, min((split + 1) * split_keys, keys))
            rows.append((start, stop - start, sequence, *key_range, split, splits, partials, keys, 0, 0, 0))
        partials += splits if splits > 1 else 0
    return np.asarray(rows, np.int32), partials


def launch(q, keys, values, out, key_start, key_stop, plan, new, scale, softcap, path=None) -> None:
    """Attention over the pages of one layer, `[pages, page_size, kv_heads, head_dim]`; fills `out`.

    `new` keys and values are written first, by the decode kernel itself if it runs the whole batch.

    Raises:
        ValueError: the named path does not support this call.
    """
    work, keys, values = plan.device_plan, keys.flatten(0, 1), values.flatten(0, 1)
    chosen = choose_path(q, scale, path, plan.max_seqlen_q)
    tensor_cores = chosen != "plain"
    long = plan.max_seqlen_q * work.group > 16
    if new is not None and (long or not tensor_cores):
        keys[work.slots], values[work.slots] = new
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
