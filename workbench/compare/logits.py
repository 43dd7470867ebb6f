"""What a difference in logits means for the next word: KL divergence, agreement, rank, and free-running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.messages import EngineOutput

_ROWS = 128


@dataclass(frozen=True)
class LogitComparison:
    """Two engines' next-token distributions over the same prompt, position by position (teacher-forced).

    Attributes:
        positions: int64 `[positions]`.
        kl: KL(reference || candidate) in nats, float64 `[positions]`.
        agreement: share of the reference's k likeliest tokens that are among the candidate's, `{k: [positions]}`.
        rank: place of the reference's likeliest token in the candidate's order, 0 is the first.
        margin: by how much, in logits, the reference prefers its first token to its second: where it is small, rounding decides.
    """

    positions: torch.Tensor
    kl: torch.Tensor
    agreement: dict[int, torch.Tensor]
    rank: torch.Tensor
    margin: torch.Tensor

    @property
    def disagreements(self) -> list[int]:
        """Positions after which the two would say different tokens."""
        return [int(position) for position in self.positions[self.rank > 0]]

    def summary(self) -> dict[str, Any]:
        """The worst and the mean over positions, and where the next token differs."""
        return {
            "kl_max": float(self.kl.max()),
            "kl_mean": float(self.kl.mean()),
            "agreement": {str(k): float(share.mean()) for k, share in self.agreement.items()},
            "rank_max": int(self.rank.max()),
            "disagreements": self.disagreements,
        }

    def __str__(self) -> str:
        wrong = self.disagreements
        said = (
            "the same next token everywhere"
            if not wrong
            else f"another next token after {len(wrong)} of {len(self.positions)} positions, first after {wrong[0]}"
        )
        return f"{said}; KL at most {float(self.kl.max()):.2e} nats"


def compare_logits(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    positions: torch.Tensor | None = None,
    tops: Sequence[int] = (1, 5, 10),
) -> LogitComparison:
    """Compare logits `[positions, vocab]`; sums run in float64.

    Raises:
        ValueError: shapes that differ. NaN in the candidate gives NaN, the last rank and no agreement.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ValueError(
            f"logits of shapes {tuple(reference.shape)} and {tuple(candidate.shape)}: give [positions, vocab] twice"
        )
    if len(reference) > _ROWS:  # float64 copies of all rows at once would be many times the logits
        parts = [
            compare_logits(reference[at : at + _ROWS], candidate[at : at + _ROWS], None, tops)
            for at in range(0, len(reference), _ROWS)
        ]
        return LogitComparison(
            torch.arange(len(reference)) if positions is None else positions,
            torch.cat([part.kl for part in parts]),
            {k: torch.cat([part.agreement[k] for part in parts]) for k in parts[0].agreement},
            torch.cat([part.rank for part in parts]),
            torch.cat([part.margin for part in parts]),
        )
    truth, other = reference.double(), candidate.double()
    log_p, log_q = truth.log_softmax(dim=-1), other.log_softmax(dim=-1)
    chance = log_p.exp()
    terms = torch.where(chance > 0, chance * (log_p - log_q), torch.zeros_like(chance))
    best = truth.topk(min(2, truth.shape[1]), dim=-1)
    first = best.indices[:, :1]
    chosen = other.gather(1, first)
    vocab = truth.shape[1]
    blind = torch.isnan(other).any(dim=1)
    # Of equal logits the first is said.
    ahead = (other > chosen) | ((other == chosen) & (torch.arange(vocab) < first))
    rank = torch.where(blind, vocab - 1, ahead.sum(dim=1))
    agreement = {}
    for k in (k for k in tops if k <= vocab):
        mine = torch.zeros(truth.shape, dtype=torch.bool).scatter_(1, truth.topk(k, dim=-1).indices, True)
        theirs = torch.zeros(truth.shape, dtype=torch.bool).scatter_(1, other.topk(k, dim=-1).indices, True)
        agreement[k] = torch.where(blind, 0.0, (mine & theirs).sum(dim=1).double() / k)
    return LogitComparison(
        torch.arange(len(truth)) if positions is None else positions,
        terms.sum(dim=-1).clamp_min(0.0),
        agreement,
        rank,
        best.values[:, 0] - best.values[:, -1],
    )


@dataclass(frozen=True)
class TextComparison:
    """Two free-running answers.

    Attributes:
        close: whether they agree, or part at a token where each one's choice is among the other's likeliest.
        at: new tokens before the first mismatch, None where there is none.
        tokens: the two tokens there.
    """

    close: bool
    at: int | None
    tokens: tuple[int | None, int | None]
    note: str

    def __str__(self) -> str:
        return self.note


def compare_text(reference: EngineOutput, candidate: EngineOutput) -> TextComparison:
    """Compare two answers as vLLM's tests do (`check_logprobs_close`).

    After the first mismatch the two continue different texts, and nothing can be said about the rest; at it, each token must be
    among the likeliest of the other.

    Args:
        reference, candidate: outputs of `generate` with `logprobs=n` set: n is how many tokens count as likeliest.

    Raises:
        ValueError: an output without logprobs where they are needed.
    """
    for at, (mine, theirs) in enumerate(zip(reference.token_ids, candidate.token_ids, strict=False)):
        if mine == theirs:
            continue
        for name, output in (("reference", reference), ("candidate", candidate)):
            if output.logprobs is None:
                raise ValueError(f"the {name} has no logprobs: generate with GenerationConfig(logprobs=5)")
        known = (theirs in reference.logprobs[at], mine in candidate.logprobs[at])  # type: ignore[index]
        close = all(known)
        words = "each is among the other's likeliest" if close else "not both are among the other's likeliest"
        return TextComparison(
            close, at, (mine, theirs), f"the answers part at new token {at} ({mine}, {theirs}): {words}"
        )
    lengths = len(reference.token_ids), len(candidate.token_ids)
    if lengths[0] == lengths[1]:
        return TextComparison(True, None, (None, None), f"the same {lengths[0]} tokens")
    at = min(lengths)
    longer = reference if lengths[0] > at else candidate
    tokens = (longer.token_ids[at], None) if longer is reference else (None, longer.token_ids[at])
    return TextComparison(
        False,
        at,
        tokens,
        f"one answer ends after {at} tokens, the other goes on: different max_new_tokens, or a stop token",
    )
