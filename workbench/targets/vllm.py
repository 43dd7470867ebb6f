"""vLLM's `prompt_embeds`, 0.9 to 0.33; read from its published packages and issues."""

from __future__ import annotations

from ..findings import Finding
from ..models import Model
from ..prompt import Prompt
from .target import Changes, Effect, Target, has_vision, whole_prompt_refused


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """Rows for the whole prompt, spliced by the caller; since 0.22 token ids may stand between them."""
    if target.before("0.9.0"):
        return Effect("differs", None, (f"{target} is older than these rules, which begin with 0.9.0",))
    refused = whole_prompt_refused(prompt, model)
    if refused:
        return refused
    mrope = prompt.position_ids is not None and prompt.position_ids.ndim == 2
    if mrope and target.before("0.24"):
        return Effect.rejects(
            "M-RoPE with prompt_embeds alone asserts before 0.24 and takes the engine down",
            "AssertionError, engine dead",
        )
    if has_vision(model) and target.before("0.24"):
        note = "models with vision inside overwrite the rows that were handed over (vLLM #45383, mended in 0.24)"
        return Effect("differs", None, (note,))
    changes = Changes(prompt)
    changes.causal()
    changes.drop_deepstack()
    changes.drop_positions("positions cannot be handed over: plain 0, 1, 2, ... are used")
    return changes.effect(_hazards(target))


def _hazards(target: Target) -> tuple[Finding, ...]:
    if target.before("0.22"):
        return ()
    return (
        Finding(
            "prefix-cache",
            "warning",
            f"{target}: where ids and rows are mixed (prompt_is_token_ids), the mask is not in the prefix cache's key, so another "
            "mixture of the same can be answered from the wrong states (vLLM #56655): send rows for the whole prompt, or a "
            "cache_salt of its own with every request",
        ),
    )
