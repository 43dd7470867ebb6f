"""Rules for vLLM's `prompt_embeds`, 0.9 to 0.33, taken from its published packages and issues."""

from __future__ import annotations

from ...models import Model
from ...prompt import Finding, Prompt
from .base import Changes, Effect, Target, has_vision, rejects_whole_prompt


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """What vLLM computes: it takes one embedding per prompt token, spliced by the caller; since 0.22 token ids may be mixed with them."""
    if target.before("0.9.0"):
        return Effect("differs", None, (f"{target} is older than these rules, which begin with 0.9.0",))
    refused = rejects_whole_prompt(prompt, model)
    if refused:
        return refused
    mrope = prompt.position_ids is not None and prompt.position_ids.ndim == 2
    if mrope and target.before("0.24"):
        return Effect.rejects(
            "M-RoPE with prompt_embeds alone fails an assertion before 0.24 and takes the engine down",
            "AssertionError, engine dead",
        )
    if has_vision(model) and target.before("0.24"):
        note = "models with vision inside overwrite the rows that were passed (vLLM #45383, fixed in 0.24)"
        return Effect("differs", None, (note,))
    changes = Changes(prompt)
    changes.causal()
    changes.drop_deepstack()
    changes.drop_positions("positions cannot be passed: plain 0, 1, 2, ... are used")
    return changes.effect(_hazards(target))


def _hazards(target: Target) -> tuple[Finding, ...]:
    if target.before("0.22"):
        return ()
    return (
        Finding(
            "prefix-cache",
            "warning",
            f"{target}: if ids and rows are mixed (prompt_is_token_ids), the mask is not in the prefix cache's key, so another "
            "mixture of the same ids and rows can get the wrong states (vLLM #56655): send rows for the whole prompt, or a "
            "different cache_salt with every request",
        ),
    )
