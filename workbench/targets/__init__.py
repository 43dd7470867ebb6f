"""What other engines do with a prompt, by version: accept it, reject it, shift rows, or ignore embeddings without a word."""

from __future__ import annotations

from ..models import Model
from ..prompt import Prompt
from . import hugging_face, lmdeploy_pytorch, sglang, turbomind, vllm
from .target import LATEST, Effect, Target

_RULES = {
    "turbomind": turbomind.effect,
    "lmdeploy-pytorch": lmdeploy_pytorch.effect,
    "vllm": vllm.effect,
    "sglang": sglang.effect,
    "transformers": hugging_face.effect,
}


def effect(prompt: Prompt, target: Target, model: Model | None = None) -> Effect:
    """Work out what `target` computes from `prompt`; with the model, widths and ids are looked at too."""
    if not prompt.input_embeddings and not prompt.embedding_ranges:
        return Effect("accepts", prompt)
    if not prompt.input_embeddings:
        return Effect.ignores(prompt, f"{len(prompt.embedding_ranges)} ranges without input_embeddings hold no rows")
    return _RULES[target.name](prompt, target, model)


__all__ = ["LATEST", "Effect", "Target", "effect"]
