"""Rules for LMDeploy's TurboMind, 0.1 to 0.18.

Taken from its source; what 0.18.0 does with bad ranges and with too few or too many rows was also observed on an H100.
"""

from __future__ import annotations

import torch

from ...models import Model
from ...prompt import Finding, Prompt
from ...prompt.checks import is_item
from .base import Changes, Effect, Target

_LANGUAGE_PARTS = frozenset(
    (
        "glm4_moe_lite", "gpt_oss", "internlm2", "internlm3", "llama", "mixtral", "qwen2", "qwen2_5_vl_text", "qwen2_moe",
        "qwen2_vl_text", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    )
)  # fmt: skip
"""`model_type` of the language parts of the classes in 0.18's `lmdeploy/turbomind/supported_models.py`."""


def effect(prompt: Prompt, target: Target, model: Model | None) -> Effect:
    """What TurboMind computes: it concatenates the rows of all items, and fills the ranges from them in order."""
    kind = None if model is None else model.text_config.model_type
    if prompt.embedding_ranges and kind is not None and kind not in _LANGUAGE_PARTS and not target.before("0.18"):
        note = (
            f"TurboMind does not run {kind!r}: LMDeploy falls back to its PyTorch engine, which ignores embeddings since 0.6.5 and looks up the "
            "placeholder tokens"
        )
        return Effect.ignores(prompt, note)
    reason = _python_refuses(prompt)
    if reason:
        return Effect.rejects(reason, "an AssertionError, RuntimeError or TypeError at the call")
    reason = _engine_rejects(prompt)
    if reason and target.before("0.12"):
        note = f'{reason}: before 0.12 that is only logged ("Skip invalid input embeddings"), and the placeholder tokens are used'
        return Effect.ignores(prompt, note)
    if reason:
        return Effect.rejects(reason, "ResponseType.SESSION_NOT_EXIST")
    width = prompt.input_embeddings[0].shape[1]
    if model is not None and width != model.text_config.hidden_size:
        note = (
            f"items are {width} wide and the model {model.text_config.hidden_size}: the width is not checked, and memory outside "
            "the rows is read; the result is undefined"
        )
        return Effect("differs", None, (note,))
    changes = Changes(prompt)
    _shift(changes)
    changes.causal()
    changes.drop_deepstack()
    if target.before("0.9.2") or not target.before("0.16"):
        changes.drop_positions("positions can be passed from 0.9.2 to 0.15 only; plain 0, 1, 2, ... are used")
    return changes.effect(_hazards(target))


def _shift(changes: Changes) -> None:
    prompt = changes.prompt
    ranges = [(start, stop) for start, stop in prompt.embedding_ranges if stop > start]
    if [len(item) for item in prompt.input_embeddings] == [stop - start for start, stop in prompt.embedding_ranges]:
        return
    rows, items, used = torch.cat(list(prompt.input_embeddings)), [], 0
    for start, stop in ranges:
        items.append(rows[used : used + stop - start])
        used += stop - start
    changes.drop(
        f"all items are concatenated ({len(rows)} rows) and ranges take rows in order ({used}): "
        + ("rows shift from one item into the next" if len(ranges) > 1 else "rows left over are dropped"),
        input_embeddings=items,
        embedding_ranges=ranges,
        spans=(),
    )


def _hazards(target: Target) -> tuple[Finding, ...]:
    if target.before("0.12") or not target.before("0.15"):
        return ()
    return (
        Finding(
            "prefix-cache",
            "warning",
            f"{target}: the prefix cache compares token ids only, so the same ids with other embeddings get the first prompt's "
            "states: keep enable_prefix_caching off (the default), or use 0.15 or later",
        ),
    )


def _python_refuses(prompt: Prompt) -> str | None:
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item):
            return f"input_embeddings[{number}] is not a dense tensor [rows, hidden]"
    items, ranges = len(prompt.input_embeddings), len(prompt.embedding_ranges)
    if items != ranges:
        return f"{items} input_embeddings and {ranges} ranges"
    widths = {item.shape[1] for item in prompt.input_embeddings}
    if len(widths) > 1:
        return f"items are {', '.join(map(str, sorted(widths)))} wide and cannot be copied into one buffer"
    return None


def _engine_rejects(prompt: Prompt) -> str | None:
    end_before = 0
    for number, (start, stop) in enumerate(prompt.embedding_ranges):
        if start < end_before:
            return f"embedding_ranges[{number}] begins at {start}, before {end_before}, the earliest possible start"
        if stop > len(prompt):
            return f"embedding_ranges[{number}] ends at {stop}, past the prompt of {len(prompt)} tokens"
        end_before = stop
    needed = sum(max(stop - start, 0) for start, stop in prompt.embedding_ranges)
    have = sum(len(item) for item in prompt.input_embeddings)
    return f"the ranges need {needed} rows, the items have {have}" if have < needed else None
