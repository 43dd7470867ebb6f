"""Faults in the engine's input: it computes another prompt than the one it was given (ranges, rows, positions, spans)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..prompt import Prompt, Span
from ..prompt.ranges import shift
from .registry import prompt_fault


def off_by_one(prompt: Prompt) -> Prompt:
    """Move every range one token to the right, as by an engine that counts the begin-of-sequence token twice."""
    return prompt.replace(embedding_ranges=shift(prompt.embedding_ranges, 1))


def placeholders_used(prompt: Prompt) -> Prompt:
    """Drop all embeddings, as by an engine that silently ignores them and looks up the placeholder tokens."""
    return prompt.replace(input_embeddings=(), embedding_ranges=(), spans=())


def rows_reversed(prompt: Prompt) -> Prompt:
    """Reverse the order of the rows of every item."""
    return prompt.replace(input_embeddings=[item.flip(0) for item in prompt.input_embeddings])


prompt_fault("range +1", "every range one token late", off_by_one, diagnosis="shifted", any_prompt=True)
prompt_fault(
    "range -1",
    "every range one token early",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, -1)),
    diagnosis="shifted",
    any_prompt=True,
)
prompt_fault(
    "range +7",
    "ranges moved by seven tokens",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, 7)),
    diagnosis="shifted",
)
prompt_fault(
    "last row lost",
    "each item one row short, its last placeholder used",
    lambda p: p.replace(
        input_embeddings=[item[:-1] for item in p.input_embeddings],
        embedding_ranges=[(start, stop - 1) for start, stop in p.embedding_ranges],
    ),
    any_prompt=True,
)
prompt_fault(
    "items swapped",
    "two items exchanged",
    lambda p: p.replace(input_embeddings=p.input_embeddings[::-1]),
    diagnosis="items",
)
prompt_fault(
    "rows reversed", "the rows of every item in reverse order", rows_reversed, diagnosis="reversed", any_prompt=True
)
prompt_fault(
    "grid transposed",
    "patches in column order",
    lambda p: p.replace(
        input_embeddings=[i.reshape(2, 3, -1).transpose(0, 1).reshape(6, -1) for i in p.input_embeddings]
    ),
    diagnosis="order",
)
prompt_fault(
    "memory transposed",
    "[hidden, rows] read as [rows, hidden]",
    lambda p: p.replace(input_embeddings=[item.t().reshape(item.shape) for item in p.input_embeddings]),
    diagnosis="memory",
)
prompt_fault(
    "placeholders used",
    "embeddings ignored, placeholder tokens looked up",
    placeholders_used,
    diagnosis="placeholders",
    any_prompt=True,
)
prompt_fault(
    "second item ignored",
    "only the first of two items is spliced",
    lambda p: p.replace(input_embeddings=p.input_embeddings[:1], embedding_ranges=p.embedding_ranges[:1], spans=()),
    diagnosis="placeholders",
)
prompt_fault(
    "row stream shifted",
    "one row too many in the first item shifts the second (TurboMind)",
    lambda p: p.replace(input_embeddings=list(torch.cat(list(p.input_embeddings)).roll(1, 0).split(6))),
    diagnosis="stream",
)
prompt_fault(
    "scale missing",
    "rows divided by sqrt(hidden)",
    lambda p: p.replace(input_embeddings=[item / item.shape[1] ** 0.5 for item in p.input_embeddings]),
    diagnosis="scale",
    any_prompt=True,
)
prompt_fault(
    "rows in bfloat16",
    "rows rounded to bfloat16 on their way into a float32 engine",
    lambda p: p.replace(input_embeddings=[item.bfloat16().to(item.dtype) for item in p.input_embeddings]),
)
prompt_fault(
    "float16 overflow",
    "rows were cast to float16 at a scale at which large numbers saturate",
    lambda p: p.replace(
        input_embeddings=[item.clamp(-2 * float(item.std()), 2 * float(item.std())) for item in p.input_embeddings]
    ),
)


def _moved_positions(change: Callable[[torch.Tensor, Prompt], torch.Tensor]) -> Callable[[Prompt], Prompt]:
    return lambda p: p.replace(position_ids=change(torch.arange(len(p)), p))


def _after_image(positions: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    stop = prompt.embedding_ranges[0][1]
    return torch.where(positions >= stop, positions + stop - prompt.embedding_ranges[0][0], positions)


prompt_fault(
    "positions past the image", "positions after an image offset by its length", _moved_positions(_after_image),
    "layers.0.attention", diagnosis="mask",
)  # fmt: skip
prompt_fault(
    "image at one position", "all rows of an image at its first position",
    _moved_positions(lambda x, p: torch.where((x >= 50) & (x < 56), torch.full_like(x, 50), x)), "layers.0.attention", diagnosis="mask",
)  # fmt: skip
prompt_fault(
    "causal instead of bidirectional", "a bidirectional span computed causally", lambda p: p.replace(spans=()), "layers.0.attention",
    bidirectional=True, diagnosis="mask",
)  # fmt: skip
prompt_fault(
    "bidirectional instead of causal", "a causal span computed bidirectionally",
    lambda p: p.replace(spans=[Span(), Span(attention="bidirectional")]), "layers.0.attention", diagnosis="mask",
)  # fmt: skip
