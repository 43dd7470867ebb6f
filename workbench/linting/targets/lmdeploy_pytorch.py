"""Rules for LMDeploy's PyTorch engine by version, taken from its source."""

from __future__ import annotations

from ...models import Model
from ...prompt import Prompt
from .base import Changes, Effect, Target, splice_error


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """What LMDeploy's PyTorch engine computes: 0.5.0 to 0.6.4 take embeddings, later ones run vision inside and silently ignore them."""
    if target.before("0.5.0"):
        return Effect.ignores(prompt, "the PyTorch engine takes no embeddings before 0.5.0")
    if not target.before("0.6.5"):
        return Effect.ignores(
            prompt,
            "since 0.6.5 the PyTorch engine runs vision inside; embeddings are silently ignored and the placeholder tokens are "
            "used: pass images (`multimodal`), or use TurboMind",
        )
    reason = splice_error(prompt, model)
    if reason:
        return Effect.rejects(reason, "an error from its index assignment")
    changes = Changes(prompt)
    changes.causal()
    changes.drop_deepstack()
    return changes.effect()
