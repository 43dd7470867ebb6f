"""Answers as token ids and as text, and prompts that are continued by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engines.base import Engine
from ..errors import ModelError
from ..prompt import Prompt


def answer_tokens(engine: Engine, answer: str | Sequence[int]) -> list[int]:
    """The token ids of an answer that is given as text or ids."""
    if isinstance(answer, str):
        return engine.model.tokenizer.encode(answer, add_special_tokens=False)
    return [int(token) for token in answer]


def answer_text(engine: Engine, tokens: Sequence[int]) -> str:
    """The tokens as text; their ids for a model without a tokenizer."""
    try:
        return engine.model.tokenizer.decode(list(tokens))
    except ModelError:
        return " ".join(map(str, tokens))


def continued(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt with answer tokens after it, at the positions that generation gives them."""
    if not tokens:
        return prompt
    positions = prompt.position_ids
    if positions is not None:
        after = positions.max() + 1 + torch.arange(len(tokens))
        positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], dim=-1)
    return prompt.replace(input_ids=[*prompt.input_ids, *tokens], position_ids=positions)
