"""Paged attention on a GPU: which kernel takes which sequence of a batch, and tokens into pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from . import attention as plain
from .device import multiprocessors
from .paths import choose, prefill
from .tiles import cut

ITEM = 12  # numbers of a decode item, the last three unused
_MOST_SPLITS = 256  # of a sequence: one block joins them, sixteen at a time
_LEAST = 4  # tiles of 64 keys in an item, at least: shorter ones cost more to join than they gain (1 x 4096: 19 us with 2, 17 with 4)


@dataclass
class DevicePlan:
    """A batch's block table and the work of both kernels, on the device.

    Attributes:
        table: int32 `[sequences, most pages]`; slots: int64 `[queries]`, where
            the last keys of each sequence lie.
        items: int32 `[n, 12]`: first query, queries, sequence, first key, end of keys, number of the split, splits of the sequence,
            number of its first partial, keys of the sequence; of sequences whose queries times group fit one tile of 16 rows.
        partials: how many partial results there are; counters: int32 zeros `[sequences * kv_heads]`, and zeros again afterwards.
        tiles: see `tiles.plan_tiles`; of the other sequences, whose third number is the sequence.
    """

    table: torch.Tensor
    slots: torch.Tensor
    cu_queries: np.ndarray
    lengths: np.ndarray
    host_table: np.ndarray
    page_size: int
    kv_heads: int
    group: int
    items: torch.Tensor | None = None
    partials: int = 0
    counters: torch.Tensor | None = None
    _tiles: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def tiles(self, rows: int) -> torch.Tensor | None:
        """Tiles of `rows` queries, or None where every sequence is short."""
        if rows not in self._tiles:
            tiles = [
                (start, count, sequence, keys)
                for sequence, (begin, stop, keys) in enumerate(self._spans())
                if (stop - begin) * self.group > 16
                for start, count in cut(begin, stop, rows)
            ]
            plan = np.asarray(tiles, np.int32).reshape(-1, 4)
            self._tiles[rows] = torch.from_numpy(plan).to(self.table.device) if tiles else None
        return self._tiles[rows]

    def _spans(self) -> list[tuple[int, int, int]]:
        return list(
            zip(self.cu_queries[:-1].tolist(), self.cu_queries[1:].tolist(), self.lengths.tolist(), strict=True)
        )

    @cached_property
    def places(self) -> torch.Tensor:
        """Where every key of the batch lies, sequence after sequence, int64: for the plain kernel, which reads no pages."""
        size = self.page_size
        places = [
            self.host_table[sequence][np.arange(keys) // size].astype(np.int64) * size + np.arange(keys) % size
            for sequence, keys in enumerate(self.lengths)
        ]
        return torch.from_numpy(np.concatenate(places)).to(self.table.device)


def plan_device(
    block_table: np.ndarray, cu_queries: np.ndarray, lengths: np.ndarray, slots: np.ndarray, pages, q_heads: int
) -> DevicePlan:
    """Cut a batch into work and put it on the device."""
    device, group = pages.device, q_heads // pages.kv_heads
    table, device_slots = (torch.from_numpy(each).to(device) for each in (block_table, slots))
    plan = DevicePlan(table, device_slots, cu_queries, lengths, block_table, pages.page_size, pages.kv_heads, group)
    # Two blocks of the decode kernel run on a multiprocessor at once.
    blocks = 2 * multiprocessors(device.index or 0) if device.type == "cuda" else 1
    items, plan.partials = plan_items(cu_queries, lengths, group, pages.kv_heads, blocks)
    if len(items):
        plan.items = torch.from_numpy(items).to(device)
        plan.counters = torch.zeros(len(lengths) * pages.kv_heads, dtype=torch.int32, device=device)
    return plan


def plan_items(
    cu_queries: np.ndarray, lengths: np.ndarray, group: int, kv_heads: int, blocks: int
) -> tuple[np.ndarray, int]:
    """Decode items int32 `[n, 12]` and the number of partial results, for a GPU that runs `blocks` blocks at once.

    Of the lengths that items may have, the one is chosen whose rounds of blocks take the fewest tiles, each round a little more.
    """
    spans = zip(cu_queries[:-1].tolist(), cu_queries[1:].tolist(), lengths.tolist(), strict=True)
    short = [(number, *span) for number, span in enumerate(spans) if 0 < (span[1] - span[0]) * group <= 16]
    if not short:
        return np.zeros((0, ITEM), np.int32), 0
    tiles = np.array([-(-keys // 64) for *_, keys in short])
    total = int(tiles.sum()) * kv_heads
    best = (math.inf, 0)
    for rounds in range(1, 9):
        size = max(-(-total // (blocks * rounds)), _LEAST, math.ceil(tiles.max() / _MOST_SPLITS))
        count = int((-(-tiles // size)).sum()) * kv_heads
        best = min(best, (-(-count // blocks) * (size + 2), size))
    size = best[1]
    items, partials = [], 0
    for sequence, start, stop, keys in short:
        splits = math.ceil(keys / (64 * size))
        even = math.ceil(keys / 64 / splits) * 64  # keys of each split
        splits = math.ceil(keys / even)
        for split in range(splits):
            stretch = (split * even, min((split + 1) * even, keys))
            items.append((start, stop - start, sequence, *stretch, split, splits, partials, keys, 0, 0, 0))
        partials += splits if splits > 1 else 0
    return np.asarray(items, np.int32), partials


def launch(q, keys, values, out, low, reach, plan, new, scale, softcap, path=None) -> None:
    """Attention over the pages of one layer, `[pages, page_size, kv_heads, head_dim]`; fills `out`.

    `new` keys and values are written first, by the decode kernel itself where it runs the whole batch.

    Raises:
        ValueError: the named path does not compute this call.
    """
    work, keys, values = plan.device_plan, keys.flatten(0, 1), values.flatten(0, 1)
    chosen = choose(q, scale, path, plan.most_queries)
    tensor_cores = chosen != "plain"
    long = plan.most_queries * work.group > 16
    if new is not None and (long or not tensor_cores):
        keys[work.slots], values[work.slots] = new
        new = None
    if not tensor_cores:
        cu_keys = np.concatenate([[0], np.cumsum(plan.lengths)]).astype(np.int32)
        places = work.places
        plain.launch(q, keys[places], values[places], out, low, reach, plan.cu_queries, cu_keys, scale, softcap)
        return
    from . import decode, tensor_core

    if work.items is not None:
        decode.launch(q, keys, values, out, low, reach, work, new, scale, softcap)
    if long:
        made = prefill(chosen)(q.shape[2], tensor_core.DTYPES[q.dtype], softcap > 0, True, q.device.index or 0)
        tensors = (tensor_core.aligned(q), keys, values)
        tiles = work.tiles(made.rows)
        tensor_core.launch_tiles(made, tensors, out, low, reach, tiles, work.table, work.page_size, scale, softcap)
