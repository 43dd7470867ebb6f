"""Checks that find what prevents a prompt from running: ids, items, ranges, spans or positions that do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EmbeddingRangeError, PromptError
from .findings import Finding
from .ranges import Range

if TYPE_CHECKING:
    from .prompt import Prompt


_LARGEST_POSITION = 1 << 31  # the next positions must not wrap


def check_prompt(prompt: Prompt, vocab_size: int | None = None, hidden_size: int | None = None) -> None:
    """Raise the first finding of `prompt_findings`, if any.

    Raises:
        EmbeddingRangeError: items, ranges or spans that do not fit.
        PromptError: any other finding.
    """
    for finding in prompt_findings(prompt, vocab_size, hidden_size):
        about_ranges = finding.code.startswith(("range", "row", "item", "span"))
        raise (EmbeddingRangeError if about_ranges else PromptError)(finding.message)


def largest(rows: torch.Tensor) -> float:
    """The largest magnitude in a tensor, 0.0 if it is empty; NaN or infinity if it has one. One pass, without a copy."""
    if not rows.numel():
        return 0.0
    low, high = (float(each) for each in rows.aminmax())
    return max(-low, high) if low == low and high == high else math.nan


def prompt_findings(prompt: Prompt, vocab_size: int | None = None, hidden_size: int | None = None) -> Iterator[Finding]:
    """Yield a finding for everything that prevents a prompt from running; see `Prompt.findings`."""
    if not prompt.input_ids:
        yield Finding("prompt-empty", "error", "the prompt has no tokens: give at least one id in input_ids")
        return
    yield from _id_findings(prompt, vocab_size)
    rows = []
    for item, rows_of in enumerate(prompt.input_embeddings):
        name = f"input_embeddings[{item}]"
        if not is_item(rows_of):
            got = type(rows_of).__name__
            if isinstance(rows_of, torch.Tensor):
                got = f"{rows_of.dtype} {tuple(rows_of.shape)}, {rows_of.layout}, on {rows_of.device}"
                if not has_storage(rows_of):
                    got += ", with a storage smaller than its shape"
            yield Finding(
                "item-shape",
                "error",
                f"{name} is {got}: give a dense torch tensor [rows, hidden] of float16, bfloat16, float32 or float64",
                item,
            )
            rows.append(_length(rows_of))
            continue
        rows.append(rows_of.shape[0])
        if hidden_size is not None and rows_of.shape[1] != hidden_size:
            yield Finding(
                "item-width",
                "error",
                f"{name} is {rows_of.shape[1]} wide but the model's hidden size is {hidden_size}: project the features "
                "to the language model's width (a vision model's projector does that)",
                item,
            )
        if not math.isfinite(largest(rows_of)):
            finite = torch.isfinite(rows_of).all(dim=1)
            bad = (~finite).nonzero().flatten().tolist()
            yield Finding(
                "item-finite",
                "error",
                f"{name} has NaN or infinity in {len(bad)} of {rows_of.shape[0]} rows, first in row {bad[0]}: check "
                "what produced it (float16 overflow in a vision tower is a common cause)",
                item,
            )
    yield from range_findings(prompt.embedding_ranges, len(prompt), rows)
    if prompt.spans and len(prompt.spans) != len(prompt.embedding_ranges):
        yield Finding(
            "span-count",
            "error",
            f"{len(prompt.spans)} spans but {len(prompt.embedding_ranges)} embedding_ranges: give one span per range, or none",
        )
    for item, span in enumerate(prompt.spans):
        if span.block is not None and not 0 <= span.block[0] < span.block[1] <= len(prompt):
            yield Finding(
                "span-block",
                "error",
                f"spans[{item}].block = {span.block} leaves the prompt of {len(prompt)} tokens: keep 0 <= start < stop <= {len(prompt)}",
                item,
            )
    yield from _deepstack_findings(prompt)
    yield from _position_findings(prompt)


def _position_findings(prompt: Prompt) -> Iterator[Finding]:
    if prompt.position_ids is None:
        return
    if prompt.position_ids.dtype not in (torch.int32, torch.int64) or not has_storage(prompt.position_ids):
        yield Finding(
            "position-dtype",
            "error",
            f"position_ids is {prompt.position_ids.dtype}, {prompt.position_ids.layout}, on {prompt.position_ids.device}: positions "
            "are integers in memory, int64 or int32",
        )
        return
    if tuple(prompt.position_ids.shape) not in ((len(prompt),), (3, len(prompt)), (4, len(prompt))):
        yield Finding(
            "position-shape",
            "error",
            f"position_ids is {tuple(prompt.position_ids.shape)} for {len(prompt)} tokens: give [{len(prompt)}], or "
            f"[3, {len(prompt)}] for M-RoPE",
        )
    elif int(prompt.position_ids.max()) >= _LARGEST_POSITION:
        yield Finding(
            "position-range",
            "error",
            f"position_ids contains {int(prompt.position_ids.max())}: positions are below {_LARGEST_POSITION}",
        )


def _id_findings(prompt: Prompt, vocab_size: int | None) -> Iterator[Finding]:
    if vocab_size is None:
        bad = [position for position, token in enumerate(prompt.input_ids) if type(token) is not int]
    else:
        bad = [
            position
            for position, token in enumerate(prompt.input_ids)
            if type(token) is not int or not 0 <= token < vocab_size
        ]
    for position in bad:
        token = prompt.input_ids[position]
        # Ids inside a range are not looked up: placeholders may have any value.
        if type(token) is int and any(start <= position < stop for start, stop in prompt.embedding_ranges):
            continue
        size = f"a vocabulary of {vocab_size}" if vocab_size is not None else "any vocabulary"
        yield Finding(
            "id-vocabulary",
            "error",
            f"input_ids[{position}] is {token!r}, which is not an id of {size}: tokenize with this model's tokenizer",
        )


def _deepstack_findings(prompt: Prompt) -> Iterator[Finding]:
    if prompt.deepstack and len(prompt.deepstack) != len(prompt.input_embeddings):
        yield Finding(
            "item-deepstack",
            "error",
            f"{len(prompt.deepstack)} deepstack tensors but {len(prompt.input_embeddings)} input_embeddings: give one per "
            "item, or none",
        )
        return
    for item, (levels, rows) in enumerate(zip(prompt.deepstack, prompt.input_embeddings, strict=False)):
        fits = (
            isinstance(levels, torch.Tensor)
            and levels.ndim == 3
            and levels.is_floating_point()
            and has_storage(levels)
            and is_item(rows)
            and levels.shape[1:] == rows.shape
        )
        if not fits or not torch.isfinite(levels).all():
            got = tuple(levels.shape) if isinstance(levels, torch.Tensor) else type(levels).__name__
            yield Finding(
                "item-deepstack",
                "error",
                f"deepstack[{item}] is {got}: give finite values [levels, rows, hidden] for the item's {tuple(rows.shape)}",
                item,
            )


def range_findings(ranges: Sequence[Range], length: int, rows: Sequence[int] | None = None) -> Iterator[Finding]:
    """Yield every error in `ranges` for a prompt of `length` tokens.

    Args:
        rows: number of rows of each item; None skips the check of row counts.
    """
    if rows is not None and len(rows) != len(ranges):
        yield Finding(
            "item-count",
            "error",
            f"{len(rows)} input_embeddings but {len(ranges)} embedding_ranges: give each item exactly one range",
        )
    end_before, before = 0, None
    for item, (start, stop) in enumerate(ranges):
        named = f"embedding_ranges[{item}] = [{start}, {stop})"
        if start < 0 or stop > length:
            yield Finding(
                "range-bounds",
                "error",
                f"{named} leaves the prompt of {length} tokens: keep 0 <= start < stop <= {length}",
                item,
            )
        if stop < start:
            yield Finding("range-reversed", "error", f"{named} runs backwards: swap its ends, [{stop}, {start})", item)
        elif stop == start:
            yield Finding(
                "range-empty", "error", f"{named} contains no token: drop it, or give it a stop above {start}", item
            )
        elif before is not None and start < end_before:
            first = max(start, ranges[before][0])
            if first < min(stop, end_before):
                shared = min(stop, end_before) - first
                yield Finding(
                    "range-overlap",
                    "error",
                    f"{named} overlaps embedding_ranges[{before}] = [{ranges[before][0]}, {ranges[before][1]}) by {shared} "
                    f"tokens: start it at {end_before} or later",
                    item,
                )
            else:
                yield Finding(
                    "range-order",
                    "error",
                    f"{named} comes after embedding_ranges[{before}] = [{ranges[before][0]}, {ranges[before][1]}) in the "
                    "list but before it in the prompt: sort ranges and items together by start",
                    item,
                )
        if rows is not None and item < len(rows) and stop > start and rows[item] != stop - start:
            yield Finding(
                "row-count",
                "error",
                f"input_embeddings[{item}] has {rows[item]} rows but {named} contains {stop - start} tokens: "
                f"{'drop ' + str(rows[item] - stop + start) + ' rows or widen' if rows[item] > stop - start else 'shorten'}"
                f" the range to [{start}, {start + rows[item]})",
                item,
            )
        if stop > start and stop > end_before:
            end_before, before = stop, item


def is_item(value: Any) -> bool:
    """Whether a value can be an item of `input_embeddings`: a dense floating-point tensor `[rows, hidden]`, not on the meta device."""
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 2
        and value.layout is torch.strided
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.device.type != "meta"
        and has_storage(value)
    )


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage contains all of its elements; reading others would crash the process."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    if not tensor.numel():
        return True
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    try:
        return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage
        return False


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:  # no length at all, or a tensor without dimensions
        return 0
