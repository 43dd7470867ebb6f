"""Lint: everything that is wrong with a prompt, in words, and what a target engine would do with it."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import EmbeddingRangeError
from ..findings import Finding
from ..models import Model
from ..prompt import Prompt
from ..targets import Effect, Target, effect
from .places import placeholder_findings, span_findings
from .rows import cast_findings, norm_findings

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def lint(
    prompt: Prompt,
    model: Model | None = None,
    target: str | None = None,
    *,
    dtype: str | None = None,
    max_prefill_token_num: int | None = None,
) -> list[Finding]:
    """All findings about a prompt: faults first, then what is merely suspect, then what `target` would do.

    Args:
        model: checks ids against its vocabulary, rows against its width and embedding table, ranges against its placeholders.
        target: `"turbomind==0.18.0"`, `"lmdeploy-pytorch"`, `"vllm"`, `"sglang"`, `"transformers"`.
        dtype: what the engine computes in; says what the cast of the rows loses.
        max_prefill_token_num: tokens of a prefill chunk, for an engine that cuts wherever a chunk ends.

    Raises:
        ValueError: a target, dtype or chunk that does not exist.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
    if max_prefill_token_num is not None and max_prefill_token_num < 1:
        raise ValueError(f"max_prefill_token_num={max_prefill_token_num}: a chunk holds at least one token")
    parsed = Target.parse(target) if target is not None else None
    config = model.text_config if model else None
    findings = list(prompt.faults(config.vocab_size, config.hidden_size) if config else prompt.faults())
    if dtype is not None:
        findings += cast_findings(prompt, dtype)
    if model is not None:
        findings += norm_findings(prompt, model)
        if not any(finding.code == "id-vocabulary" for finding in findings):
            findings += placeholder_findings(prompt, model)
    findings += span_findings(prompt, model, max_prefill_token_num)
    if parsed is not None:
        findings += _target_findings(effect(prompt, parsed, model), parsed)
    return findings


def effective_prompt(prompt: Prompt, target: str, model: Model | None = None) -> Prompt:
    """The prompt that `target` really computes: rows shifted, embeddings ignored, positions dropped.

    Run it on the reference to reproduce, and thereby explain, a wrong answer.

    Raises:
        EmbeddingRangeError: the target rejects the prompt, so that it computes nothing, or nobody can say what it computes.
    """
    parsed = Target.parse(target)
    result = effect(prompt, parsed, model)
    if result.prompt is None:
        verb = "computes nothing from this prompt" if result.outcome == "rejects" else "computes something undefined"
        raise EmbeddingRangeError(f"{parsed} {verb}: {result.notes[0]}")
    return result.prompt


def _target_findings(result: Effect, target: Target) -> Iterator[Finding]:
    status = f"; that surfaces as {result.status}" if result.status else ""
    for note in result.notes:
        yield Finding(f"target-{result.outcome}", "warning", f"{target}: {note}{status}")
    if result.outcome == "accepts":
        yield Finding("target-accepts", "info", f"{target} computes this prompt as it stands")
    yield from result.hazards
