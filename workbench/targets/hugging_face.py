"""Transformers' `generate(inputs_embeds=...)` and its own splice; read from 5.0 and 5.23."""

from __future__ import annotations

from ..findings import Finding
from ..models import Model, placeholder_id
from ..prompt import Prompt
from .target import Effect, Target, whole_prompt_refused


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """It computes any prompt that can be spliced; traps are in how it is called."""
    refused = whole_prompt_refused(prompt, model)
    if refused:
        return refused
    hazards = []
    if prompt.bidirectional:
        hazards.append(
            Finding(
                "flash-causal",
                "warning",
                f"{target}: with attn_implementation='flash_attention_2' bidirectional spans are silently causal (its mask function "
                "is ignored): take 'sdpa' or 'eager', and hand over token_type_ids",
            )
        )
    if model is not None and placeholder_id(model.config) is not None and len(prompt.input_embeddings) > 1:
        hazards.append(
            Finding(
                "placeholder-totals",
                "info",
                f"{target}: the model's own splice compares placeholders and features in total over the batch, so a row too many in "
                "one picture and one too few in another cancel out unnoticed",
            )
        )
    return Effect("accepts", prompt, hazards=tuple(hazards))
