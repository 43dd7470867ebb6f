"""Prompts of any multimodal class of Transformers: ids from its own processor, everything else from its own forward pass.

No family is known here. The processor expands placeholders; `record_decoder_inputs` says which tokens got rows, and what else the
class computes for them; what a Prompt cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch

from ..errors import ModelError, PromptError
from ..prompt import Prompt, Span
from ..prompt.ranges import Range
from .audio import open_audio
from .decoder_inputs import record_decoder_inputs
from .images import open_image
from .messages import Item
from .own_processor import MODALITIES, OwnProcessor
from .videos import open_video


def process_items(processor: OwnProcessor, text: str, items: Sequence[Item]) -> dict[str, Any]:
    """Return the class's inputs for a text with a marker for each item.

    Raises:
        PromptError and its kinds: an item cannot be used, or the processor rejects it.
    """
    opened: dict[str, list[Any]] = {each: [] for each in MODALITIES}
    for modality, content in items:
        opened[modality].append(_open(processor, modality, content))
    if len(items) > 1:  # which tokens belong to which item
        with suppress(PromptError):  # not every processor can tell
            return processor.process(text, opened, return_text_replacement_offsets=True)
    return processor.process(text, opened)


def _open(processor: OwnProcessor, modality: str, content: Any) -> Any:
    if modality == "image":
        return open_image(content)
    if modality == "audio":
        return open_audio(content, processor.sampling_rate)
    return open_video(content, processor.sampled_frames)


def class_prompt(
    network: Any, processor: OwnProcessor, processed: Mapping[str, Any], items: Sequence[Item], like: Any
) -> Prompt:
    """Return the Prompt whose rows, ranges, positions and spans are those that the class hands to its decoder.

    Args:
        network: the class, with or without its decoder's layers.
        processed: from `process_items`.
        items: the same.
        like: a function that moves a tensor to the network's device and dtype.

    Raises:
        PromptError: the class rejects the inputs.
        ModelError: it does something that a Prompt cannot express.
    """
    ids = processed["input_ids"][0].tolist()
    if not items:
        return Prompt(ids)
    inputs = {name: like(value) for name, value in processed.items() if name != "text_replacement_offsets"}
    recorded = record_decoder_inputs(network, inputs)
    if not bool(recorded.places.any()):
        raise ModelError(
            f"{type(network).__name__} replaces the embedding of no token: it may put other tokens in place of images, which have no "
            "rows. Run its images with 'transformers-multimodal'"
        )
    owners = _owners(processor, ids, recorded.places, processed, items)
    if ignored := set(range(len(items))) - set(owners):
        first = min(ignored)
        raise ModelError(
            f"{type(network).__name__} puts no rows into the prompt for item {first} ({items[first].modality}): this "
            "checkpoint takes none"
        )
    ranges, spans = _ranges(recorded.places, owners, _grids(network, processed, items))
    sizes = [stop - start for start, stop in ranges]
    deepstack = [] if recorded.deepstack is None else list(recorded.deepstack.split(sizes, dim=1))
    return Prompt(
        ids,
        list(recorded.rows.split(sizes)),
        ranges,
        _attention(type(network).__name__, recorded.visible, ranges, spans),
        _needed(recorded.position_ids),
        deepstack,
    )


def _needed(positions: torch.Tensor | None) -> torch.Tensor | None:
    """Positions that are not simply 0, 1, 2, ..."""
    if positions is None or (positions.ndim == 1 and torch.equal(positions, torch.arange(len(positions)))):
        return None
    return positions


def _owners(
    processor: OwnProcessor,
    ids: Sequence[int],
    places: torch.Tensor,
    processed: Mapping[str, Any],
    items: Sequence[Item],
) -> list[int]:
    """For each token that got a row, the number of the item it belongs to.

    An item's tokens are counted in the text that the processor put in place of its marker, or, if it does not tell, by
    processing the item alone.

    Raises:
        ModelError: the counts do not add up.
    """
    total = int(places.sum())
    if len(items) == 1:
        return [0] * total
    replaced = {token for token, place in zip(ids, places.tolist(), strict=True) if place}
    texts = processor.replacements(processed)
    counts = [
        sum(token in replaced for token in processor.tokenizer.encode(text, add_special_tokens=False)) for text in texts
    ]
    if len(counts) != len(items) or sum(counts) != total:
        counts = []
        for item in items:
            alone = process_items(processor, processor.text_of([item.modality]), [item])
            counts.append(sum(token in replaced for token in alone["input_ids"][0].tolist()))
    if sum(counts) != total:
        raise ModelError(
            f"{total} tokens of {processor.model_type} get rows, but {len(items)} items alone get {counts}: which row belongs to which "
            "item is not known. Give one item, or build the Prompt yourself"
        )
    return [number for number, count in enumerate(counts) for _ in range(count)]


def _ranges(
    places: torch.Tensor, owners: Sequence[int], grids: Sequence[tuple[str, tuple[int, ...] | None]]
) -> tuple[list[Range], list[Span]]:
    """Return a range and a span for each run of adjacent tokens of one item."""
    runs: list[tuple[int, int, int]] = []
    positions = places.nonzero()[:, 0].tolist()
    for (owner, _), group in groupby(enumerate(positions), key=lambda pair: (owners[pair[0]], pair[1] - pair[0])):
        run = [position for _, position in group]
        runs.append((owner, run[0], run[-1] + 1))
    ranges, spans = [], []
    for owner, start, stop in runs:
        own = [run for run in runs if run[0] == owner]
        label, grid = grids[owner]
        part = own.index((owner, start, stop))
        ranges.append((start, stop))
        spans.append(
            Span(
                label.split(" ")[0],
                _part_grid(grid, len(own), stop - start),
                "causal",
                label if len(own) == 1 else f"{label}, part {part + 1} of {len(own)}",
            )
        )
    return ranges, spans


def _part_grid(grid: tuple[int, ...] | None, parts: int, rows: int) -> tuple[int, ...] | None:
    """The grid of one of an item's equal parts: the whole, one of its frames, or one of its lines; a square if nothing is known of a single part."""
    if grid is not None:
        time, height, width = grid
        if parts == 1 and rows == time * height * width:
            return grid
        if parts == time and rows == height * width:
            return (1, height, width)
        if parts == height and rows == width and time == 1:
            return (1, 1, width)
        return None
    if parts > 1:  # lines of rows, or tiles of unknown shape
        return (1, rows)
    side = round(rows**0.5)
    return (side, side) if side * side == rows else None


def _grids(
    network: Any, processed: Mapping[str, Any], items: Sequence[Item]
) -> list[tuple[str, tuple[int, ...] | None]]:
    """A label and the grid of rows of each item, (time, height, width), where the processor's output says it."""
    vision = getattr(network.config, "vision_config", None) or network.config
    merge = getattr(vision, "spatial_merge_size", None) or getattr(network.config, "spatial_merge_size", None) or 1
    seen = dict.fromkeys(MODALITIES, 0)
    found: list[tuple[str, tuple[int, ...] | None]] = []
    for modality, _ in items:
        number = seen[modality]
        seen[modality] += 1
        sizes = processed.get(f"{modality}_grid_thw")
        grid = None
        if isinstance(sizes, torch.Tensor) and sizes.ndim == 2 and number < len(sizes) and sizes.shape[1] == 3:
            time, height, width = sizes[number].tolist()
            grid = (time, height // merge, width // merge)
        found.append((f"{modality} {number}", grid))
    return found


def _attention(name: str, visible: torch.Tensor | None, ranges: Sequence[Range], spans: Sequence[Span]) -> list[Span]:
    """Return the spans with the blocks of tokens that attend to each other, so that together they allow what `visible` allows.

    Raises:
        ModelError: no blocks do.
    """
    if visible is None:
        return list(spans)
    length = len(visible)
    steps = torch.arange(1, length + 1)
    ends = torch.where(visible, steps, 0).amax(dim=-1)
    later = ends > steps
    said, expressed = [], torch.ones(length, length, dtype=torch.bool).tril()
    for (start, stop), span in zip(ranges, spans, strict=True):
        own = ends[start:stop]
        if bool(later[start:stop].any()) and bool((own == own[0]).all()):
            end = int(own[0])
            first = int((ends == end).nonzero()[0])
            expressed[first:end, first:end] = True
            block = None if (first, end) == (start, stop) else (first, end)
            said.append(Span(span.modality, span.grid, "bidirectional", span.label, block))
        else:
            said.append(span)
    if not torch.equal(expressed.triu(1), visible.triu(1)):
        raise ModelError(
            f"{name} lets tokens attend to later ones in a way that spans cannot express: run its images with 'transformers-multimodal'"
        )
    return said
