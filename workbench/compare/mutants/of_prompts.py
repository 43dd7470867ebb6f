"""Faults of what the engine is given: ranges, rows, positions, spans."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...prompt import Prompt, Span
from ...ranges import shift
from .. import faults
from .mutant import of_prompt

of_prompt("range +1", "every range one token late", faults.off_by_one, kind="shifted")
of_prompt(
    "range -1",
    "every range one token early",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, -1)),
    kind="shifted",
)
of_prompt(
    "range +7",
    "ranges moved by seven tokens",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, 7)),
    kind="shifted",
)
of_prompt(
    "last row lost",
    "each item one row short, its last placeholder used",
    lambda p: p.replace(
        input_embeddings=[item[:-1] for item in p.input_embeddings],
        embedding_ranges=[(start, stop - 1) for start, stop in p.embedding_ranges],
    ),
)
of_prompt(
    "items swapped",
    "two items in each other's place",
    lambda p: p.replace(input_embeddings=p.input_embeddings[::-1]),
    kind="items",
)
of_prompt("rows reversed", "the rows of every item in reverse order", faults.rows_reversed, kind="reversed")
of_prompt(
    "grid transposed",
    "patches in column order",
    lambda p: p.replace(
        input_embeddings=[i.reshape(2, 3, -1).transpose(0, 1).reshape(6, -1) for i in p.input_embeddings]
    ),
    kind="order",
)
of_prompt(
    "memory transposed",
    "[hidden, rows] read as [rows, hidden]",
    lambda p: p.replace(input_embeddings=[item.t().reshape(item.shape) for item in p.input_embeddings]),
    kind="memory",
)
of_prompt(
    "placeholders used", "embeddings swallowed, placeholder tokens looked up", faults.placeholders, kind="placeholders"
)
of_prompt(
    "second item ignored",
    "only the first of two items is spliced",
    lambda p: p.replace(input_embeddings=p.input_embeddings[:1], embedding_ranges=p.embedding_ranges[:1], spans=()),
    kind="placeholders",
)
of_prompt(
    "row stream shifted",
    "a row too many in the first item shifts the second (TurboMind)",
    lambda p: p.replace(input_embeddings=list(torch.cat(list(p.input_embeddings)).roll(1, 0).split(6))),
    kind="stream",
)
of_prompt(
    "scale missing",
    "rows divided by sqrt(hidden)",
    lambda p: p.replace(input_embeddings=[item / item.shape[1] ** 0.5 for item in p.input_embeddings]),
    kind="scale",
)
of_prompt(
    "rows in bfloat16",
    "rows rounded to bfloat16 on their way into a float32 engine",
    lambda p: p.replace(input_embeddings=[item.bfloat16().to(item.dtype) for item in p.input_embeddings]),
)
of_prompt(
    "float16 overflow",
    "rows went through float16 at a scale where large numbers saturate",
    lambda p: p.replace(
        input_embeddings=[item.clamp(-2 * float(item.std()), 2 * float(item.std())) for item in p.input_embeddings]
    ),
)


def _moved_positions(change: Callable[[torch.Tensor, Prompt], torch.Tensor]) -> Callable[[Prompt], Prompt]:
    return lambda p: p.replace(position_ids=change(torch.arange(len(p)), p))


def _after_image(positions: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    stop = prompt.embedding_ranges[0][1]
    return torch.where(positions >= stop, positions + stop - prompt.embedding_ranges[0][0], positions)


of_prompt(
    "positions past the image", "positions after an image offset by its length", _moved_positions(_after_image),
    "layers.0.attention", kind="mask",
)  # fmt: skip
of_prompt(
    "image at one position", "all rows of an image at its first position",
    _moved_positions(lambda x, p: torch.where((x >= 50) & (x < 56), torch.full_like(x, 50), x)), "layers.0.attention", kind="mask",
)  # fmt: skip
of_prompt(
    "causal where both ways", "a bidirectional span computed causally", lambda p: p.replace(spans=()), "layers.0.attention",
    both_ways=True, kind="mask",
)  # fmt: skip
of_prompt(
    "both ways where causal", "a causal span whose tokens see each other both ways",
    lambda p: p.replace(spans=[Span(), Span(attention="bidirectional")]), "layers.0.attention", kind="mask",
)  # fmt: skip
