"""What to inject: rows made from a model's own embedding table, whose effect a person can predict."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import PromptError
from .models import Model

KINDS = ("identity", "another word", "mix", "noise")


def injected_rows(
    kind: str, model: Model, own_ids: Sequence[int], *, word: str = "", share: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Rows `[len(own_ids), hidden]` to put over the tokens `own_ids`.

    Args:
        kind: "identity", the tokens' own rows, which must change nothing; "another word", the rows of `word` (repeated to
            fill the range, cut to fit it); "mix", own rows and those of `word`; "noise", random directions as long as the
            rows they replace.
        share: of `word` in a mix, 0 to 1.
        seed: of the noise.

    Raises:
        PromptError: a word without tokens, or a kind that does not exist.
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
        raise PromptError(f"the word to inject, {word!r}, has no tokens: type a word (a leading blank belongs to it)")
    other = model.token_rows([ids[i % len(ids)] for i in range(len(own_ids))])
    return other if kind == "another word" else (1.0 - share) * own + share * other


def noise_like(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random directions, each as long as the row of `rows` `[rows, hidden]` it stands for."""
    noise = torch.randn(rows.shape, generator=generator)
    return noise * (rows.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
