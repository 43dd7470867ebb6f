"""The public splice call: hidden state 0 of a prompt, table rows for ids and item rows inside ranges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def splice(
    input_ids: torch.Tensor | Sequence[int],
    table: torch.Tensor,
    items: Sequence[torch.Tensor] = (),
    ranges: Sequence[tuple[int, int]] = (),
    *,
    offset: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Look up `input_ids` in `table` and put the rows of `items[i]` into positions `ranges[i]`.

    Args:
        input_ids: `[tokens]`, token ids of one packed batch or chunk. Ids inside ranges are never looked up.
        table: `[vocab, hidden]`, float32, float16 or bfloat16, contiguous.
        items: item i is `[stop_i - start_i, hidden]`; another float dtype is cast to the table's.
        ranges: half-open `(start, stop)` in prompt positions, sorted and disjoint.
        offset: prompt position of `input_ids[0]`. Ranges are clipped to the chunk `[offset, offset + tokens)`.
        scale: factor on looked-up rows only (Gemma multiplies them by sqrt(hidden); injected rows come ready).

    Returns:
        `[tokens, hidden]` in the table's dtype and on its device.

    Raises:
        ValueError: an id outside the vocabulary, or items and ranges that do not fit; the message names the item.

    >>> table = torch.arange(8.0).reshape(4, 2)
    >>> splice([0, 3, 3], table, [torch.tensor([[9.0, 9.0]])], [(1, 2)]).tolist()
    [[0.0, 1.0], [9.0, 9.0], [6.0, 7.0]]
    """
    input_ids = torch.as_tensor(input_ids)
    whole = not (input_ids.dtype is torch.bool or input_ids.is_floating_point() or input_ids.is_complex())
    if input_ids.numel() and not whole:
        raise ValueError(f"input_ids is {input_ids.dtype}: token ids are integers")
    input_ids = input_ids.to(table.device, torch.int64)
    if table.ndim != 2 or table.dtype not in DTYPES or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} {tuple(table.shape)}: expected a contiguous [vocab, hidden] in float32, float16 or "
            "bfloat16"
        )
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected one packed [tokens]")
    clipped = clip_items(items, ranges, table, offset, offset + len(input_ids))
    out = torch.empty((len(input_ids), table.shape[1]), dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    if table.device.type == "cpu":
        from .cpu.launch import splice as launch_cpu

        plan, rows = pack_rows(clipped, table)
        launch_cpu(input_ids, table, rows, plan, out, float(scale))
    elif table.device.type == "cuda":
        from .cuda.splice import launch as launch_cuda

        launch_cuda(input_ids, table, clipped, out, float(scale))
    else:
        raise ValueError(f"table is on {table.device}: kernels exist for cpu and cuda")
    return out


Clipped = list[tuple[int, int, torch.Tensor]]


def clip_items(
    items: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]], table: torch.Tensor, begin: int, end: int
) -> Clipped:
    """The parts of ranges inside the chunk `[begin, end)`: start and stop counted from `begin`, and the rows, cast and moved
    to the table's dtype and device."""
    if len(items) != len(ranges):
        raise ValueError(f"{len(items)} items but {len(ranges)} ranges: each item needs one range")
    clipped: Clipped = []
    end_before = 0
    for number, (item, (start, stop)) in enumerate(zip(items, ranges, strict=True)):
        if start < end_before or stop <= start:
            raise ValueError(
                f"range {number} is [{start}, {stop}), after one that ends at {end_before}: ranges must be sorted, disjoint "
                "and not empty"
            )
        if item.shape != (stop - start, table.shape[1]) or not item.is_floating_point():
            raise ValueError(
                f"item {number} is {item.dtype} {tuple(item.shape)}: range [{start}, {stop}) of a table of width "
                f"{table.shape[1]} takes floats {(stop - start, table.shape[1])}"
            )
        end_before = stop
        first, last = max(start, begin), min(stop, end)
        if first < last:
            # Each torch call costs microseconds, and there may be hundreds of items.
            rows = item if (first, last) == (start, stop) else item[first - start : last - start]
            if rows.dtype is not table.dtype or rows.device != table.device:
                rows = rows.to(table.device, table.dtype)
            clipped.append((first - begin, last - begin, rows))
    return clipped


def pack_rows(clipped: Clipped, table: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """All rows in one tensor.

    Returns:
        `plan`, int32 `[clipped ranges, 3]`: start, stop, and the first packed row; and `rows` `[packed rows, hidden]`.
    """
    plan, packed = [], 0
    for start, stop, _ in clipped:
        plan.append((start, stop, packed))
        packed += stop - start
    needed = [rows for _, _, rows in clipped]
    rows = torch.cat(needed) if len(needed) > 1 else needed[0].contiguous() if needed else table[:0]
    return np.asarray(plan, dtype=np.int32).reshape(-1, 3), rows
