"""The choice of a step's tokens on the GPU: the likeliest, or sampled, after penalties; the host does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sampling import GenerationState
from ..sampling_rows import on_device, sample_rows


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
    everyone = len(rows) == len(states)
    at = None if everyone else _numbers([row for row, _ in rows], logits.device)
    adjusted = (logits if at is None else logits[at]).float()
    generated = [state.num_generated + ahead for _, state in rows]
    changing = [number for number, (_, state) in enumerate(rows) if state.sampler.changes_logits(generated[number])]
    if changing and adjusted.data_ptr() == logits.data_ptr():
        adjusted = adjusted.clone()
    for number in changing:
        adjusted[number] = rows[number][1].sampler.adjust_on_device(adjusted[number], generated[number])
    sampled = [number for number, (_, state) in enumerate(rows) if state.sampler.samples]
    settings = [rows[number][1].sampler.settings(generated[number]) for number in sampled]
    if len(sampled) == len(rows):
        chosen = sample_rows(adjusted, settings)
    else:
        chosen = adjusted.argmax(dim=1)
        if sampled:
            some = _numbers(sampled, logits.device)
            chosen[some] = sample_rows(adjusted[some], settings)
    if at is None:
        tokens = torch.where(likeliest < 0, -1, chosen)
    else:
        tokens = likeliest.clone()
        tokens[at] = torch.where(likeliest[at] < 0, -1, chosen)
    for number, (_, state) in enumerate(rows):
        if state.config.repetition_penalty != 1.0:
            state.sampler.see_on_device(chosen[number : number + 1])
    return tokens


def _numbers(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Row numbers on the GPU."""
    return on_device(torch.tensor(numbers), device)


def _otherwise(state: GenerationState | None, ahead: int) -> bool:
    if state is None or state.needs_logits or state.wants_all_states:
        return False
    return state.sampler.samples or state.sampler.changes_logits(state.num_generated + ahead)
