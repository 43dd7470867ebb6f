"""Rules, by engine and version, for what other engines do with a prompt: accept or reject it, shift rows, or ignore embeddings."""

from __future__ import annotations

from ...models import Model
from ...prompt import Prompt
from . import lmdeploy_pytorch, sglang, transformers, turbomind, vllm
from .base import LATEST, Effect, Target

_RULES = {
    "turbomind": turbomind.effect,
    "lmdeploy-pytorch": lmdeploy_pytorch.effect,
    "vllm": vllm.effect,
    "sglang": sglang.effect,
    "transformers": transformers.effect,
}


def effect(prompt: Prompt, target: Target, model: Model | None = None) -> Effect:
    """Predict by rules, without running anything, what `target` computes from `prompt`; with the model, widths and ids are checked too."""
    if not prompt.input_embeddings and not prompt.embedding_ranges:
        return Effect("accepts", prompt)
    if not prompt.input_embeddings:
        return Effect.ignores(prompt, f"{len(prompt.embedding_ranges)} ranges without input_embeddings have no rows")
    return _RULES[target.name](prompt, target, model)


__all__ = ["LATEST", "Effect", "Target", "effect"]
