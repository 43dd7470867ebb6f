"""Invalid prompts, the typical mistakes of callers. Each function makes a valid prompt with two items invalid."""

from __future__ import annotations

import torch

from ..prompt import Prompt
from .registry import invalid_prompt


def _unsorted(prompt: Prompt) -> Prompt:
    return prompt.replace(
        embedding_ranges=prompt.embedding_ranges[::-1], input_embeddings=prompt.input_embeddings[::-1], spans=()
    )


def _overlapping(prompt: Prompt) -> Prompt:
    (a, b), *rest = prompt.embedding_ranges
    start, stop = rest[0]
    return prompt.replace(embedding_ranges=[(a, b), (b - 1, b - 1 + stop - start), *rest[1:]], spans=())


def _out_of_bounds(prompt: Prompt) -> Prompt:
    *rest, (start, stop) = prompt.embedding_ranges
    return prompt.replace(embedding_ranges=[*rest, (len(prompt) - 1, len(prompt) - 1 + stop - start)], spans=())


def _short(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[first[:-1], *rest])


def _long(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[torch.cat([first, first[:1]]), *rest])


def _exchanged_lengths(prompt: Prompt) -> Prompt:
    """One row too many in the first item and one too few in the second: the totals agree."""
    first, second, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[torch.cat([first, first[:1]]), second[:-1], *rest])


def _item_too_many(prompt: Prompt) -> Prompt:
    return prompt.replace(input_embeddings=[*prompt.input_embeddings, prompt.input_embeddings[0][:1]])


def _reversed(prompt: Prompt) -> Prompt:
    (start, stop), *rest = prompt.embedding_ranges
    return prompt.replace(embedding_ranges=[(stop, start), *rest], spans=())


def _off_by_one(prompt: Prompt) -> Prompt:
    return prompt.replace(embedding_ranges=[(start + 1, stop + 1) for start, stop in prompt.embedding_ranges])


def _nan(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    broken = first.clone()
    broken[0, 0] = torch.nan
    return prompt.replace(input_embeddings=[broken, *rest])


def _wrong_width(prompt: Prompt) -> Prompt:
    return prompt.replace(input_embeddings=[item[:, :-8].contiguous() for item in prompt.input_embeddings])


def _two_widths(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[first, *(item[:, :-8].contiguous() for item in rest)])


invalid_prompt("unsorted", "items and ranges in reverse order", _unsorted)
invalid_prompt("overlapping", "the second range begins one token before the first ends", _overlapping)
invalid_prompt("out of bounds", "the last range ends past the prompt", _out_of_bounds)
invalid_prompt("one row too few", "the first item lacks its last row", _short)
invalid_prompt("one row too many", "the first item has an extra row", _long)
invalid_prompt(
    "row counts exchanged",
    "one row too many in the first item, one too few in the second: the totals agree",
    _exchanged_lengths,
)
invalid_prompt("one item too many", "an item without a range", _item_too_many)
invalid_prompt("reversed range", "start and stop of the first range exchanged", _reversed)
invalid_prompt("off by one", "every range one token late", _off_by_one)
invalid_prompt("NaN", "NaN in the first number of the first item", _nan)
invalid_prompt("wrong width", "items narrower than the hidden size", _wrong_width)
invalid_prompt("two widths", "items of two widths", _two_widths)
