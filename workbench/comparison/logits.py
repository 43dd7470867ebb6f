"""Compare two engines' next-token distributions (KL divergence, top-k agreement, rank) and their generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.types import EngineOutput

_CHUNK_ROWS = 128


@dataclass(frozen=True)
class LogitComparison:
    """Two engines' next-token distributions over the same prompt, position by position (teacher-forced).

    Attributes:
        positions: int64 `[positions]`, prompt positions.
        kl: KL(reference || candidate) in nats, float64 `[positions]`.
        agreement: share of the reference's k likeliest tokens that are among the candidate's k likeliest, `{k: float64 [positions]}`.
        rank: rank of the reference's likeliest token in the candidate's order, from 0, int64 `[positions]`.
        margin: difference of the reference's two largest logits, float64 `[positions]`; if it is small, rounding can exchange them.
    """

    positions: torch.Tensor
    kl: torch.Tensor
    agreement: dict[int, torch.Tensor]
    rank: torch.Tensor
    margin: torch.Tensor

    @property
    def disagreements(self) -> list[int]:
        """Positions after which the two engines choose different tokens."""
        return [int(position) for position in self.positions[self.rank > 0]]

    def summary(self) -> dict[str, Any]:
        """JSON values: the largest and mean KL, mean agreement, largest rank, and the positions at which the next token differs."""
        return {
            "kl_max": float(self.kl.max()),
            "kl_mean": float(self.kl.mean()),
            "agreement": {str(k): float(share.mean()) for k, share in self.agreement.items()},
            "rank_max": int(self.rank.max()),
            "disagreements": self.disagreements,
        }

    def __str__(self) -> str:
        wrong = self.disagreements
        text = (
            "the same next token everywhere"
            if not wrong
            else f"a different next token after {len(wrong)} of {len(self.positions)} positions, first after {wrong[0]}"
        )
        return f"{text}; KL at most {float(self.kl.max()):.2e} nats"


def compare_logits(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    positions: torch.Tensor | None = None,
    tops: Sequence[int] = (1, 5, 10),
) -> LogitComparison:
    """Compare logits `[positions, vocab]`, in float64.

    A candidate row with NaN gets a KL of NaN, the last rank, and an agreement of 0.

    Args:
        positions: prompt positions of the rows; None: 0, 1, 2, ...
        tops: values of k for the top-k agreement.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ValueError(
            f"logits of shapes {tuple(reference.shape)} and {tuple(candidate.shape)}: give two tensors [positions, vocab]"
        )
    if len(reference) > _CHUNK_ROWS:  # float64 copies of all rows at once would need many times the logits' memory
        parts = [
            compare_logits(reference[at : at + _CHUNK_ROWS], candidate[at : at + _CHUNK_ROWS], None, tops)
            for at in range(0, len(reference), _CHUNK_ROWS)
        ]
        return LogitComparison(
            torch.arange(len(reference)) if positions is None else positions,
            torch.cat([part.kl for part in parts]),
            {k: torch.cat([part.agreement[k] for part in parts]) for k in parts[0].agreement},
            torch.cat([part.rank for part in parts]),
            torch.cat([part.margin for part in parts]),
        )
    expected, other = reference.double(), candidate.double()
    log_p, log_q = expected.log_softmax(dim=-1), other.log_softmax(dim=-1)
    chance = log_p.exp()
    terms = torch.where(chance > 0, chance * (log_p - log_q), torch.zeros_like(chance))
    best = expected.topk(min(2, expected.shape[1]), dim=-1)
    first = best.indices[:, :1]
    chosen = other.gather(1, first)
    vocab = expected.shape[1]
    has_nan = torch.isnan(other).any(dim=1)
    # Of equal logits, the lowest token id is chosen.
    ahead = (other > chosen) | ((other == chosen) & (torch.arange(vocab) < first))
    rank = torch.where(has_nan, vocab - 1, ahead.sum(dim=1))
    agreement = {}
    for k in (k for k in tops if k <= vocab):
        mine = torch.zeros(expected.shape, dtype=torch.bool).scatter_(1, expected.topk(k, dim=-1).indices, True)
        theirs = torch.zeros(expected.shape, dtype=torch.bool).scatter_(1, other.topk(k, dim=-1).indices, True)
        agreement[k] = torch.where(has_nan, 0.0, (mine & theirs).sum(dim=1).double() / k)
    return LogitComparison(
        torch.arange(len(expected)) if positions is None else positions,
        terms.sum(dim=-1).clamp_min(0.0),
        agreement,
        rank,
        best.values[:, 0] - best.values[:, -1],
    )


@dataclass(frozen=True)
class TextComparison:
    """The comparison of two generated answers.

    Attributes:
        close: whether they are equal, or at the first mismatch each one's token is among the other's likeliest.
        at: number of new tokens before the first mismatch; None if they are equal.
        tokens: the two tokens at the mismatch, (reference, candidate); None for an answer that has ended.
        note: the result in words.
    """

    close: bool
    at: int | None
    tokens: tuple[int | None, int | None]
    note: str

    def __str__(self) -> str:
        return self.note


def compare_text(reference: EngineOutput, candidate: EngineOutput) -> TextComparison:
    """Compare two generated answers as vLLM's tests do (`check_logprobs_close`).

    At the first mismatch, each one's token must be among the other's likeliest there. Later tokens are not compared, since the two
    then continue different texts.

    Args:
        reference, candidate: outputs of `generate` with `logprobs=n`; the n likeliest tokens count.

    Raises:
        ValueError: the answers differ, and an output has no logprobs.
    """
    for at, (mine, theirs) in enumerate(zip(reference.token_ids, candidate.token_ids, strict=False)):
        if mine == theirs:
            continue
        for name, output in (("reference", reference), ("candidate", candidate)):
            if output.logprobs is None:
                raise ValueError(f"the {name} has no logprobs: generate with GenerationConfig(logprobs=5)")
        known = (theirs in reference.logprobs[at], mine in candidate.logprobs[at])  # type: ignore[index]
        close = all(known)
        words = "each is among the other's likeliest" if close else "they are not both among the other's likeliest"
        return TextComparison(
            close, at, (mine, theirs), f"the answers differ from new token {at} on ({mine}, {theirs}): {words}"
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
        f"one answer ends after {at} tokens, the other continues: different max_new_tokens, or a stop token",
    )
