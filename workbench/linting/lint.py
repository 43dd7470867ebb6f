"""Lint: find everything that is wrong with a prompt, without running it, and predict what a target engine would do with it."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import EmbeddingRangeError
from ..models import Model
from ..prompt import Finding, Prompt
from .embeddings import cast_findings, norm_findings
from .placement import placeholder_findings, span_findings
from .targets import Effect, Target, effect

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def lint(
    prompt: Prompt,
    model: Model | None = None,
    target: str | None = None,
    *,
    dtype: str | None = None,
    max_prefill_token_num: int | None = None,
) -> list[Finding]:
    """Return all findings about a prompt: errors first, then what is only suspicious, then what `target` would do with it.

    The model does not run.

    Args:
        model: if given, ids are checked against its vocabulary, rows against its hidden size and the norms of its embedding table,
            and ranges against its placeholder tokens.
        target: an engine, with a version or in the newest known one: "turbomind==0.18.0", "lmdeploy-pytorch", "vllm", "sglang",
            "transformers".
        dtype: the engine's dtype; if given, what is lost when rows are cast to it is reported.
        max_prefill_token_num: tokens per prefill chunk; if given, bidirectional spans that such chunks would cut are reported.

    Raises:
        ValueError: an unknown target or dtype, or a chunk of less than one token.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
    if max_prefill_token_num is not None and max_prefill_token_num < 1:
        raise ValueError(f"max_prefill_token_num={max_prefill_token_num}: a chunk has at least one token")
    parsed = Target.parse(target) if target is not None else None
    config = model.text_config if model else None
    findings = list(prompt.findings(config.vocab_size, config.hidden_size) if config else prompt.findings())
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
    """Return the prompt that `target` actually computes, for example with rows shifted, embeddings ignored or positions dropped.

    If the reference computes the same wrong answer from it, the answer is explained.

    Args:
        target: as for `lint`.
        model: if given, widths and ids are checked against it.

    Raises:
        EmbeddingRangeError: the target rejects the prompt and computes nothing, or its result is undefined.
        ValueError: an unknown target.
    """
    parsed = Target.parse(target)
    result = effect(prompt, parsed, model)
    if result.prompt is None:
        verb = "computes nothing from this prompt" if result.outcome == "rejects" else "computes something undefined"
        raise EmbeddingRangeError(f"{parsed} {verb}: {result.notes[0]}")
    return result.prompt


def _target_findings(result: Effect, target: Target) -> Iterator[Finding]:
    status = f"; it surfaces as {result.status}" if result.status else ""
    for note in result.notes:
        yield Finding(f"target-{result.outcome}", "warning", f"{target}: {note}{status}")
    if result.outcome == "accepts":
        yield Finding("target-accepts", "info", f"{target} computes this prompt unchanged")
    yield from result.hazards
