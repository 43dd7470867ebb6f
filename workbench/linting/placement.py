"""Findings about which tokens are inside ranges (placeholders, text, control tokens), and about what spans need from an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ..errors import ModelError
from ..models import Model
from ..models.model import placeholder_id
from ..prompt import Finding, Prompt, Range
from ..prompt.ranges import clip
from ..vision.architectures import image_attention

_MAX_LISTED = 4  # positions or tokens listed in a message


def placeholder_findings(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Yield findings on ranges that do not match the model's placeholder tokens, if it has any, or that contain control tokens."""
    ids = np.asarray(prompt.input_ids)
    inside = np.zeros(len(ids), dtype=bool)
    for start, stop in prompt.embedding_ranges:
        inside[max(start, 0) : max(stop, 0)] = True
    if not inside.any():
        return
    placeholder = placeholder_id(model.config)
    if placeholder is not None and (ids == placeholder).any():
        yield from _against_placeholders(prompt, model, ids, inside, placeholder)
    elif placeholder is not None:
        yield Finding(
            "placeholder-missing",
            "info",
            f"the prompt does not contain the model's placeholder {_named(model, placeholder)}; engines that look for it "
            "(Transformers' own forward does) will not find these items",
        )
    control = np.isin(ids, list(_control_ids(model))) & inside
    if control.any():
        at = control.nonzero()[0]
        yield Finding(
            "range-over-control",
            "warning",
            f"{len(at)} control token{'s' * (len(at) > 1)} under ranges ({_listed(model, ids, at)}): the model no longer sees them; move the range, "
            "unless that is what you want",
            _item_at(prompt, int(at[0])),
        )


def _against_placeholders(
    prompt: Prompt, model: Model, ids: np.ndarray, inside: np.ndarray, placeholder: int
) -> Iterator[Finding]:
    covered, bare = inside & (ids != placeholder), ~inside & (ids == placeholder)
    expected = _placeholder_ranges(ids == placeholder, [stop - start for start, stop in prompt.embedding_ranges])
    shifts = [right[0] - start for right, (start, _) in zip(expected, prompt.embedding_ranges, strict=False)]
    if covered.any():
        at = covered.nonzero()[0]
        fix = "move the ranges over the placeholders"
        if shifts and len(set(shifts)) == 1:
            fix = f"move every range by {shifts[0]:+d}, and each covers its placeholders exactly"
        elif shifts:
            fix = f"their placeholders are at {', '.join(f'[{a}, {b})' for a, b in expected[:_MAX_LISTED])}"
        yield Finding(
            "range-over-text",
            "warning",
            f"{_tokens(len(at))} that should be read {'is' if len(at) == 1 else 'are'} under ranges and {'is' if len(at) == 1 else 'are'} "
            f"lost ({_listed(model, ids, at)}): {fix}",
            _item_at(prompt, int(at[0])),
        )
    if bare.any():
        at = bare.nonzero()[0]
        yield Finding(
            "placeholder-bare",
            "warning",
            f"{len(at)} of {int((ids == placeholder).sum())} placeholders {_named(model, placeholder)} are outside every range (first at "
            f"position {at[0]}): the model reads them as tokens. {int(inside.sum())} tokens are inside ranges; is a row or an item "
            "missing, or is a range too short?",
        )


def span_findings(prompt: Prompt, model: Model | None, max_prefill_token_num: int | None) -> Iterator[Finding]:
    """Yield findings on what images need besides rows: M-RoPE positions, bidirectional attention, chunks with whole spans.

    Args:
        model: None skips the checks of positions and attention.
        max_prefill_token_num: tokens per prefill chunk; None skips the check of chunks.
    """
    if model is not None and prompt.embedding_ranges:
        config = model.text_config
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("mrope_section") and (prompt.position_ids is None or prompt.position_ids.ndim != 2):
            yield Finding(
                "positions-missing",
                "warning",
                f"{config.model_type} rotates by time, height and width (M-RoPE), and position_ids is "
                f"{'missing' if prompt.position_ids is None else 'one number per token'}: image rows would get text positions. Give [3, seq]; "
                "build_prompt makes them",
            )
        elif rope.get("mrope_section"):
            yield from _grid_findings(prompt)
        yield from _deepstack_findings(prompt, model)
        if image_attention(model.config) == "bidirectional" and not prompt.bidirectional_ranges:
            yield Finding(
                "attention-causal",
                "warning",
                f"{model.config.model_type} lets the tokens of an image attend bidirectionally, but no span is bidirectional: give "
                "Span(attention='bidirectional'); build_prompt does",
            )
    if max_prefill_token_num is not None:
        for number, (start, stop) in enumerate(prompt.bidirectional_ranges):
            first = start // max_prefill_token_num
            if first != (stop - 1) // max_prefill_token_num:
                at = (first + 1) * max_prefill_token_num
                yield Finding(
                    "span-cut",
                    "warning",
                    f"the tokens of [{start}, {stop}) attend bidirectionally, and a prefill in chunks of {max_prefill_token_num} "
                    f"cuts them at {at}: rows before it cannot see rows after it. Raise max_prefill_token_num to {stop} or more, or "
                    "use an engine that never cuts a span",
                    number,
                )


def _grid_findings(prompt: Prompt) -> Iterator[Finding]:
    """Images whose positions by height and width are not those of their grid, row by row."""
    positions = prompt.position_ids
    if positions is None or len(positions) != 3:
        return
    for number, (span, (start, stop)) in enumerate(zip(prompt.spans, prompt.embedding_ranges, strict=False)):
        grid = span.grid
        if (
            span.modality != "image"
            or grid is None
            or len(grid) != 3
            or grid[0] != 1
            or grid[1] * grid[2] != stop - start
        ):
            continue
        _, height, width = grid
        rows = positions[1:, max(start, 0) : max(stop, 0)].to(torch.int64)
        if rows.shape[1] != stop - start:  # the range leaves the prompt, which is another finding
            continue
        found = rows - rows[:, :1]
        if torch.equal(found, _on_grid(height, width)):
            continue
        if height != width and torch.equal(found, _on_grid(width, height)):
            what = f"are those of a grid of {width} x {height}: height and width are exchanged"
        elif not found.any():
            what = "are the same for all rows"
        elif torch.equal(found[0], found[1]):
            what = "count on as in text"
        else:
            row = int((found != _on_grid(height, width)).any(dim=0).nonzero()[0])
            what = f"leave it at row {row}: height and width {found[:, row].tolist()} after the first row's"
        yield Finding(
            "positions-grid",
            "warning",
            f"item {number} has a grid of {height} x {width}, and position_ids of [{start}, {stop}) {what}. Give height and width row by "
            "row; build_prompt makes them",
            number,
        )


def _on_grid(height: int, width: int) -> torch.Tensor:
    """Height and width of the rows of a grid, int64 `[2, height * width]`."""
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([down.flatten(), across.flatten()])


def _deepstack_findings(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Findings on features for early layers, which Qwen3-VL and its like add at image rows; without them images are half seen."""
    levels = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None)
    pictures = [span.modality in ("image", "video") for span in prompt.spans] or [True]
    if not levels or not any(pictures):
        return
    if not prompt.deepstack:
        yield Finding(
            "deepstack-missing",
            "warning",
            f"{model.config.model_type} adds features of {len(levels)} levels of its vision tower after its first {len(levels)} layers, and "
            f"deepstack is empty: give [{len(levels)}, rows, hidden] for each item; build_prompt does",
        )
        return
    for number, item in enumerate(prompt.deepstack):
        if item.ndim == 3 and len(item) != len(levels):
            yield Finding(
                "deepstack-levels",
                "warning",
                f"deepstack[{number}] has {len(item)} levels and {model.config.model_type} has {len(levels)}: give one for each of "
                f"deepstack_visual_indexes={list(levels)}",
                number,
            )


@lru_cache(maxsize=8)
def _control_ids(model: Model) -> frozenset[int]:
    """Ids that control a chat (begin, end, turns), without the placeholders of images and audio."""
    try:
        special = set(model.tokenizer.all_special_ids)
    except ModelError:  # without a tokenizer, control tokens are unknown
        return frozenset()
    config = model.config
    names = (name for name in config.to_dict() if name.endswith(("_token_id", "_token_index")))
    media = {getattr(config, name, None) for name in names if name.startswith(("image", "video", "audio", "vision"))}
    return frozenset(special - media)


def _item_at(prompt: Prompt, position: int) -> int | None:
    return next((item for item, _ in clip(prompt.embedding_ranges, position, position + 1)), None)


def _placeholder_ranges(placeholders: np.ndarray, lengths: Sequence[int]) -> list[Range]:
    """The ranges of these lengths, in this order, that cover all placeholders exactly; empty if that is impossible.

    `placeholders`: bool `[seq]`.
    """
    positions = placeholders.nonzero()[0]
    if len(positions) != sum(lengths):
        return []
    ranges, at = [], 0
    for length in lengths:
        first, last = int(positions[at]), int(positions[at + length - 1])
        if length < 1 or last - first != length - 1:
            return []
        ranges.append((first, last + 1))
        at += length
    return ranges


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _named(model: Model, token: int) -> str:
    try:
        return f"{model.tokens([token])[0]!r} ({token})"
    except ModelError:
        return str(token)


def _listed(model: Model, ids: np.ndarray, at: Sequence[int] | np.ndarray) -> str:
    shown = [f"{_named(model, int(ids[position]))} at {position}" for position in at[:_MAX_LISTED]]
    return ", ".join([*shown, "..."] if len(at) > _MAX_LISTED else shown)
