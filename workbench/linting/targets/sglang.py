"""Rules for SGLang's `input_embeds`, 0.4 to 0.5.23, taken from its published packages."""

from __future__ import annotations

import torch

from ...models import Model
from ...prompt import Prompt
from .base import Changes, Effect, Target, rejects_whole_prompt


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """What SGLang computes: it takes one embedding per prompt token, as nested lists of floats, and always rounds them to bfloat16."""
    if target.before("0.4.0"):
        return Effect("differs", None, (f"{target} is older than these rules, which begin with 0.4.0",))
    refused = rejects_whole_prompt(prompt, model)
    if refused:
        return refused
    changes = Changes(prompt)
    changes.causal()
    rounded = [item.bfloat16() for item in prompt.input_embeddings]
    pairs = list(zip(rounded, prompt.input_embeddings, strict=True))
    lossy = sum(int((ours.double() != item.double()).any(dim=1).sum()) for ours, item in pairs)
    if lossy and all(bool(torch.isfinite(item).all()) for item in rounded):
        changes.drop(
            f"rows are rounded to bfloat16 whatever the model's dtype is: {lossy} of {sum(map(len, rounded))} rows change",
            input_embeddings=rounded,
        )
    changes.drop_deepstack()
    changes.drop_positions("positions cannot be passed: plain 0, 1, 2, ... are used")
    return changes.effect()
