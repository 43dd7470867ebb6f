"""Rules for Transformers' `generate(inputs_embeds=...)` and its own splice, taken from the source of 5.0 and 5.23."""

from __future__ import annotations

from ...models import Model
from ...models.model import placeholder_id
from ...prompt import Finding, Prompt
from .base import Effect, Target, rejects_whole_prompt


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """What Transformers computes: any prompt that can be spliced; hazards come from how it is called."""
    refused = rejects_whole_prompt(prompt, model)
    if refused:
        return refused
    hazards = []
    if prompt.bidirectional_ranges:
        hazards.append(
            Finding(
                "flash-causal",
                "warning",
                f"{target}: with attn_implementation='flash_attention_2' bidirectional spans are silently causal (its mask function "
                "is ignored): use 'sdpa' or 'eager', and pass token_type_ids",
            )
        )
    if model is not None and placeholder_id(model.config) is not None and len(prompt.input_embeddings) > 1:
        hazards.append(
            Finding(
                "placeholder-totals",
                "info",
                f"{target}: the model's own splice compares placeholders and features in total over the batch, so a row too many in "
                "one image and one too few in another cancel out unnoticed",
            )
        )
    return Effect("accepts", prompt, hazards=tuple(hazards))
