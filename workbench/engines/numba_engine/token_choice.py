"""The choice of a step's tokens on the GPU: the likeliest, or sampled, after penalties; the host does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sampling import GenerationState
from ..sampling_rows import sample_rows


def chooses_likeliest(states: Sequence[GenerationState | None], ahead: int = 0) -> bool:
    """Whether every request takes its likeliest token as it is; arguments as in `choose_tokens`."""
    return not any(_otherwise(state, ahead) for state in states)


def choose_tokens(
    logits: torch.Tensor, likeliest: torch.Tensor, states: Sequence[GenerationState | None], ahead: int = 0
) -> torch.Tensor:
    """Choose the next token of each request.

    Args:
        logits: `[requests, vocab]` on the GPU.
        likeliest: int64 `[requests]`, the likeliest tokens; -1 where the logits contain NaN.
        states: of the requests; None, or one that needs its logits on the host, takes the likeliest.
        ahead: tokens of these requests that were chosen on the GPU and are not known on the host yet.

    Returns:
        int64 `[requests]` on the GPU, -1 where the logits contain NaN.
    """
    rows = [(row, state) for row, state in enumerate(states) if state is not None and _otherwise(state, ahead)]
    if not rows:
        return likeliest
    changed = []
    for row, state in rows:
        own = logits[row].float()
        generated = state.num_generated + ahead
        changed.append(
            state.sampler.adjust_on_device(own, generated) if state.sampler.changes_logits(generated) else own
        )
    adjusted = torch.stack(changed)
    chosen = adjusted.argmax(dim=1)
    sampled = [number for number, (_, state) in enumerate(rows) if state.sampler.samples]
    if sampled:
        settings = [rows[number][1].sampler.settings(rows[number][1].num_generated + ahead) for number in sampled]
        finite = adjusted.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # their token is -1 in the end
        if len(sampled) == len(rows):
            chosen = sample_rows(finite, settings)
        else:
            at = torch.tensor(sampled).pin_memory().to(logits.device, non_blocking=True)
            chosen[at] = sample_rows(finite[at], settings)
    tokens = likeliest.clone()
    if len(rows) == len(states):
        tokens = torch.where(likeliest < 0, -1, chosen)
    else:
        at = torch.tensor([row for row, _ in rows]).pin_memory().to(logits.device, non_blocking=True)
        tokens[at] = torch.where(likeliest[at] < 0, -1, chosen)
    for number, (_, state) in enumerate(rows):
        if state.config.repetition_penalty != 1.0:
            state.sampler.see_on_device(chosen[number : number + 1])
    return tokens


def _otherwise(state: GenerationState | None, ahead: int) -> bool:
    if state is None or state.needs_logits or state.wants_all_states:
        return False
    return state.sampler.samples or state.sampler.changes_logits(state.num_generated + ahead)
