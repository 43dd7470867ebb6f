"""LMDeploy's PyTorch engine, by version; read from its sources."""

from __future__ import annotations

from ..models import Model
from ..prompt import Prompt
from .target import Changes, Effect, Target, unsplicable


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """It took embeddings from 0.5.0 to 0.6.4; since then it runs vision inside and swallows them."""
    if target.before("0.5.0"):
        return Effect.ignores(prompt, "the PyTorch engine takes no embeddings before 0.5.0")
    if not target.before("0.6.5"):
        return Effect.ignores(
            prompt,
            "since 0.6.5 the PyTorch engine runs vision inside; embeddings are swallowed without a word and the placeholder tokens are "
            "used: hand it images (`multimodal`), or use TurboMind",
        )
    reason = unsplicable(prompt, model)
    if reason:
        return Effect.rejects(reason, "an error from its index assignment")
    changes = Changes(prompt)
    changes.causal()
    changes.drop_deepstack()
    return changes.effect()
