"""Rows (embedding vectors) to inject, made from a model's own embedding table, so that their effect is predictable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PromptError
from .model import Model

KINDS = ("identity", "another word", "mix", "noise")


def injected_rows(
    kind: str, model: Model, own_ids: Sequence[int], *, word: str = "", share: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Return embedding vectors, float32 `[len(own_ids), hidden]`, to inject over the tokens `own_ids`.

    Args:
        kind: "identity", the tokens' own embeddings, so that the injection changes nothing; "another word", the embeddings of
            `word`, repeated or cut to fill the range; "mix", a weighted mean of these two; "noise", random directions with the
            norms of the embeddings that they replace.
        word: for "another word" and "mix", with its leading space.
        share: weight of `word` in a mix, 0 to 1.
        seed: seed of the noise.

    Raises:
        PromptError: a word without tokens, or an unknown kind.
    """
    own = model.token_rows(own_ids)
    if kind == "identity":
        return own
    if kind == "noise":
        return noise_like(own, torch.Generator().manual_seed(seed))
    if kind not in KINDS:
        raise PromptError(f"no injection {kind!r}: choose one of {', '.join(KINDS)}")
    ids = model.tokenizer.encode(word, add_special_tokens=False)
    if not ids:
        raise PromptError(f"the word to inject, {word!r}, has no tokens: type a word (with its leading space)")
    other = model.token_rows([ids[i % len(ids)] for i in range(len(own_ids))])
    return other if kind == "another word" else (1.0 - share) * own + share * other


def noise_like(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random directions, each with the norm of the row of `rows` `[rows, hidden]` that it replaces."""
    noise = torch.randn(rows.shape, generator=generator)
    return noise * (rows.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
