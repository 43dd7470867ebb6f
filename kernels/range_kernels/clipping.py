"""Clip injected items to the chunk of a prompt that one call computes, and pack their rows for a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Clipped = list[tuple[int, int, torch.Tensor]]
"""For each range that overlaps the chunk: start and stop in the chunk, and its rows `[stop - start, hidden]`."""


def clip_items(
    items: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]], table: torch.Tensor, begin: int, end: int
) -> Clipped:
    """Return the parts of the items that are inside the chunk, the tokens `[begin, end)` of the prompt.

    Args:
        items: `items[i]` is `[stop_i - start_i, hidden]`, in any float dtype.
        ranges: half-open `(start, stop)` in prompt positions, sorted and disjoint.
        table: the embedding table `[vocab, hidden]`; the returned rows are on its device.

    Raises:
        ValueError: ranges are unsorted, overlap or are empty, or an item does not fit its range.
    """
    if len(items) != len(ranges):
        raise ValueError(f"{len(items)} items but {len(ranges)} ranges: each item needs one range")
    clipped: Clipped = []
    end_before = 0
    for number, (item, (start, stop)) in enumerate(zip(items, ranges, strict=True)):
        if start < end_before or stop <= start:
            raise ValueError(
                f"range {number} is [{start}, {stop}), after a range that ends at {end_before}: ranges must be sorted, disjoint "
                "and not empty"
            )
        if item.shape != (stop - start, table.shape[1]) or not item.is_floating_point():
            raise ValueError(
                f"item {number} is {item.dtype} {tuple(item.shape)}: range [{start}, {stop}) of a table of width "
                f"{table.shape[1]} needs floats of shape {(stop - start, table.shape[1])}"
            )
        end_before = stop
        first, last = max(start, begin), min(stop, end)
        if first < last:
            # Each torch call costs microseconds, and there may be hundreds of items.
            rows = item if (first, last) == (start, stop) else item[first - start : last - start]
            if rows.device != table.device:
                rows = rows.to(table.device)
            clipped.append((first - begin, last - begin, rows))
    return clipped


def cast(clipped: Clipped, table: torch.Tensor) -> Clipped:
    """Return `clipped` with all rows in the table's dtype."""
    return [(start, stop, rows if rows.dtype is table.dtype else rows.to(table.dtype)) for start, stop, rows in clipped]


def pack_rows(clipped: Clipped, table: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Concatenate all rows into one tensor.

    Returns:
        `plan`, int32 `[clipped ranges, 3]`: start and stop in the chunk, and the index in `rows` of the range's first
        row; and `rows` `[packed rows, hidden]`.
    """
    plan, packed = [], 0
    for start, stop, _ in clipped:
        plan.append((start, stop, packed))
        packed += stop - start
    needed = [rows for _, _, rows in clipped]
    rows = torch.cat(needed) if len(needed) > 1 else needed[0].contiguous() if needed else table[:0]
    return np.asarray(plan, dtype=np.int32).reshape(-1, 3), rows
