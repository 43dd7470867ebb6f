"""Lint: everything that is wrong with a prompt, in words, and what a target engine would do with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import EmbeddingRangeError
from .findings import Finding
from .models import Model, embedding_scale
from .prompt import Prompt, is_item
from .targets import Target, effect


def lint(prompt: Prompt, model: Model | None = None, target: str | None = None) -> list[Finding]:
    """All findings about a prompt: faults first, then what is merely suspect, then what `target` would do.

    Args:
        model: checks ids against its vocabulary, rows against its width and its embedding table.
        target: `"turbomind==0.18.0"`, `"lmdeploy-pytorch"`, `"transformers"`.
    """
    config = model.text_config if model else None
    findings = list(prompt.faults(config.vocab_size, config.hidden_size) if config else prompt.faults())
    if model is not None:
        findings += _norm_outliers(prompt, model)
    if target is not None:
        findings += _target_findings(prompt, Target.parse(target))
    return findings


def effective_prompt(prompt: Prompt, target: str) -> Prompt:
    """The prompt that `target` really computes: rows shifted, embeddings ignored, positions dropped.

    Run it on the reference to reproduce, and thereby explain, a wrong answer.

    Raises:
        EmbeddingRangeError: the target rejects the prompt, so that it computes nothing.
    """
    parsed = Target.parse(target)
    result = effect(prompt, parsed)
    if result.prompt is None:
        raise EmbeddingRangeError(f"{parsed} computes nothing from this prompt: {result.notes[0]}")
    return result.prompt


def _target_findings(prompt: Prompt, target: Target) -> Iterator[Finding]:
    result = effect(prompt, target)
    for note in result.notes:
        yield Finding("target-rejects" if result.prompt is None else "target-differs", "warning", f"{target}: {note}")
    if not result.notes:
        yield Finding("target-accepts", "info", f"{target} computes this prompt as it stands")


def _norm_outliers(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Rows far longer or shorter than any token embedding usually come from a missing projector, norm or scale."""
    norms = torch.linalg.vector_norm(model.embedding_table.float(), dim=1) * embedding_scale(model.text_config)
    least, most = float(norms.quantile(0.001)), float(norms.max())
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item) or not torch.isfinite(item).all():
            continue
        sizes = torch.linalg.vector_norm(item.float(), dim=1)
        outside = ((sizes > 10 * most) | (sizes < least / 10)).nonzero().flatten().tolist()
        if outside:
            yield Finding(
                "row-norm",
                "warning",
                f"input_embeddings[{number}]: {len(outside)} of {len(item)} rows have a norm far from the embedding table's "
                f"{least:.3g} to {most:.3g} (row {outside[0]}: {float(sizes[outside[0]]):.3g}): is a projector, a norm or the "
                "embedding scale missing?",
                number,
            )
