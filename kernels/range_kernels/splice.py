"""`splice`, the public call: hidden state 0 of a prompt, with injected rows in its ranges; and `SplicePlan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .clipping import cast, clip_items, pack_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def splice(
    input_ids: torch.Tensor | Sequence[int],
    table: torch.Tensor,
    items: Sequence[torch.Tensor] = (),
    ranges: Sequence[tuple[int, int]] = (),
    *,
    offset: int = 0,
    scale: float = 1.0,
    plan: SplicePlan | None = None,
) -> torch.Tensor:
    """Return hidden state 0 of a prompt or chunk: rows of `items[i]` at positions `ranges[i]`, else table rows.

    Args:
        input_ids: `[tokens]`, token ids of one packed batch or chunk. Ids inside ranges are never looked up.
        table: `[vocab, hidden]`, float32, float16 or bfloat16, contiguous.
        items: item i is `[stop_i - start_i, hidden]`; another float dtype is cast to the table's.
        ranges: half-open `(start, stop)` in prompt positions, sorted and disjoint.
        offset: prompt position of `input_ids[0]`. Ranges are clipped to the chunk `[offset, offset + tokens)`.
        scale: factor on looked-up rows only (Gemma multiplies them by sqrt(hidden); injected rows are already scaled).
        plan: a `SplicePlan`, instead of `items`, `ranges` and `offset`. If it is `capturable` and the ids are on the
            GPU, nothing is copied between host and device, so the call can be captured in a CUDA graph.

    Returns:
        `[tokens, hidden]` in the table's dtype and on its device.

    Raises:
        ValueError: items and ranges do not fit (the message names the item), or, on the CPU, an id is outside the
            vocabulary. A GPU does not check ids: the row of an unknown id is NaN.

    >>> table = torch.arange(8.0).reshape(4, 2)
    >>> splice([0, 3, 3], table, [torch.tensor([[9.0, 9.0]])], [(1, 2)]).tolist()
    [[0.0, 1.0], [9.0, 9.0], [6.0, 7.0]]
    """
    input_ids = torch.as_tensor(input_ids)
    is_integer = not (input_ids.dtype is torch.bool or input_ids.is_floating_point() or input_ids.is_complex())
    if input_ids.numel() and not is_integer:
        raise ValueError(f"input_ids is {input_ids.dtype}: token ids are integers")
    input_ids = input_ids.to(table.device, torch.int64).contiguous()
    if table.ndim != 2 or table.dtype not in DTYPES or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} {tuple(table.shape)}: expected a contiguous [vocab, hidden] in float32, float16 or "
            "bfloat16"
        )
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected one packed [tokens]")
    if plan is None:
        clipped = clip_items(items, ranges, table, offset, offset + len(input_ids))
    else:
        plan.check(input_ids, table, items, ranges, offset)
        clipped = plan.clipped
    out = torch.empty((len(input_ids), table.shape[1]), dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    if table.device.type == "cpu":
        from .cpu.launch import splice as launch_cpu

        row_ranges, rows = pack_rows(cast(clipped, table), table)
        launch_cpu(input_ids, table, rows, row_ranges, out, float(scale))
    elif table.device.type == "cuda":
        from .cuda.splice import launch as launch_cuda

        launch_cuda(input_ids, table, clipped, out, float(scale), None if plan is None else plan.on_device)
    else:
        raise ValueError(f"table is on {table.device}: kernels exist for cpu and cuda")
    return out


class SplicePlan:
    """Items and ranges of one batch or chunk, checked and prepared once, for repeated calls and CUDA graphs.

    Items that are on the table's device and have a supported dtype and contiguous rows are read in place at each call,
    so later writes to them take effect. Other items are copied once, when the plan is made.

    Attributes:
        capturable: whether a call with this plan is a single kernel launch and can be captured in a CUDA graph. It is
            on a GPU if the rows of the table and of all items are aligned to 16 bytes.

    Args:
        items, ranges, offset: as in `splice`.
        table: the table of the calls, or one of the same shape, dtype and device.
        tokens: number of tokens of each call.

    Raises:
        ValueError: as in `splice`.
    """

    def __init__(
        self,
        items: Sequence[torch.Tensor],
        ranges: Sequence[tuple[int, int]],
        table: torch.Tensor,
        tokens: int,
        *,
        offset: int = 0,
    ) -> None:
        self.clipped = clip_items(items, ranges, table, offset, offset + tokens)
        self.tokens, self.kind = tokens, (table.shape[1], table.dtype, table.device)
        self.on_device = None
        self.capturable = False
        if table.device.type == "cuda":
            from .cuda.splice import prepare

            self.on_device, self.capturable = prepare(self.clipped, table)

    def check(self, input_ids: torch.Tensor, table: torch.Tensor, items: Any, ranges: Any, offset: int) -> None:
        """Raise ValueError if the call also passes items, ranges or an offset, or has another length or table."""
        if len(items) or len(ranges) or offset:
            raise ValueError("plan already contains items, ranges and offset: leave them out")
        if len(input_ids) != self.tokens:
            raise ValueError(f"{len(input_ids)} input_ids, but the plan is for {self.tokens}: make one for this length")
        if (table.shape[1], table.dtype, table.device) != self.kind:
            width, dtype, device = self.kind
            raise ValueError(
                f"table is {table.dtype} of width {table.shape[1]} on {table.device}, the plan for {dtype} of width {width} "
                f"on {device}: make one for this table"
            )
