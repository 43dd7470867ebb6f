"""Judge the log-probabilities that an engine reported for its own tokens: rounding, another meaning of the numbers, or a bug.

The tokens are forced through the reference in float64; its runs in the engine's dtype say how far rounding alone goes. Before a
difference is called a bug, what such numbers are usually confused with is tried: raw or processed, shifted by one token, without the
first token of the template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import PromptError
from ..models import Model
from ..prompt import Prompt
from .reference_cache import reference_pair
from .reference_work import FLOOR_RUNS
from .rollout_files import Rollout
from .verdict import FACTOR

_LEAST = 4e-7
"""The smallest floor of a log-probability: engines report them in float32, in which numbers around 4 have this spacing."""


@dataclass(frozen=True)
class RolloutJudgement:
    """What became of one run.

    Attributes:
        verdict: "noise": rounding explains every token; "meaning": another reading of the numbers does, see `reads_as`; "bug".
        reads_as: in words, what the numbers are instead of the log-probabilities that the settings say; None if they are those.
        first: index among the generated tokens of the first that rounding does not explain (with `verdict` "bug"); else None.
        reported, expected: natural log-probabilities, float64 `[tokens]`; expected under the reading that explains them, with "bug" under what the settings say.
        floors: what rounding alone can change, `[tokens]`.
        name: of the run.
    """

    verdict: Literal["noise", "meaning", "bug"]
    reads_as: str | None
    first: int | None
    reported: torch.Tensor
    expected: torch.Tensor
    floors: torch.Tensor
    name: str

    @property
    def ratios(self) -> torch.Tensor:
        """Difference in noise floors, `[tokens]`; 0 where nothing is expected."""
        ratios = (self.reported - self.expected).abs() / self.floors
        return torch.where(torch.isnan(ratios), 0.0, ratios)

    @property
    def failed(self) -> bool:
        """Whether rounding does not explain the numbers as their settings describe them."""
        return self.verdict != "noise"

    def __str__(self) -> str:
        worst = float(self.ratios.max())
        if self.verdict == "noise":
            return f"{self.name}: noise, at most {worst:.1f} noise floors over {len(self.reported)} tokens"
        if self.verdict == "meaning":
            return f"{self.name}: the numbers are {self.reads_as}; read so, at most {worst:.1f} noise floors"
        at = self.first
        assert at is not None
        return (
            f"{self.name}: token {at} of {len(self.reported)} is the first that rounding does not explain: reported {float(self.reported[at]):.4f}, "
            f"expected {float(self.expected[at]):.4f}, {float(self.ratios[at]):.0f} noise floors ({float(self.floors[at]):.1e}); "
            f"{int((self.ratios > FACTOR).sum())} tokens are off"
        )


def judge_rollout(model: Model, rollout: Rollout, *, dtype: str = "bfloat16", device: str = "cpu") -> RolloutJudgement:
    """Compare reported log-probabilities with those of the reference.

    Args:
        dtype: what the engine computed in.

    Raises:
        PromptError: a token outside the vocabulary, a temperature that is not positive, or a prompt that cannot run.
        ModelError: the model cannot be a reference.
    """
    if rollout.temperature <= 0 or not 0 < rollout.top_p <= 1:
        raise PromptError(
            f"{rollout.name}: temperature={rollout.temperature:g}, top_p={rollout.top_p:g}: give a positive temperature (1 if the numbers are "
            "raw) and a top_p above 0, at most 1"
        )
    vocab = model.text_config.vocab_size
    outside = next((token for token in rollout.token_ids if not 0 <= token < vocab), None)
    if outside is not None:
        raise PromptError(
            f"{rollout.name}: token {outside} is outside the vocabulary of {vocab}: is it another model's run?"
        )
    exact, rounded = reference_pair(model, dtype, device)
    reported = torch.tensor(rollout.logprobs, dtype=torch.float64)
    best: RolloutJudgement | None = None
    logits = _forced(exact, rollout.prompt, rollout.token_ids, 0)
    runs = [_forced(rounded, rollout.prompt, rollout.token_ids, seed) for seed in range(FLOOR_RUNS)]
    for reads_as, read in _readings(rollout):
        expected = read(logits)
        floors = torch.stack([(read(run) - expected).abs() for run in runs]).amax(dim=0)
        found = _judged(rollout, reads_as, reported, expected, _smoothed(floors))
        if found.verdict != "bug":
            return found
        if best is None:
            best = found
    for reads_as, prompt in _other_prompts(model, rollout.prompt):
        expected = _chosen(_forced(exact, prompt, rollout.token_ids, 0), rollout, rollout.temperature)
        found = _judged(rollout, reads_as, reported, expected, best.floors if best is not None else expected)
        if found.verdict != "bug":
            return found
    assert best is not None
    return best


def _smoothed(floors: torch.Tensor) -> torch.Tensor:
    """At least the typical floor of the run: four runs may agree at a token by chance."""
    known = floors[torch.isfinite(floors)]
    typical = float(known.median()) if len(known) else 0.0
    return torch.where(torch.isnan(floors), 0.0, floors).clamp(min=max(typical, _LEAST))


def _judged(
    rollout: Rollout, reads_as: str | None, reported: torch.Tensor, expected: torch.Tensor, floors: torch.Tensor
) -> RolloutJudgement:
    known = ~torch.isnan(expected)
    off = known & ~((reported - expected).abs() <= FACTOR * floors)
    verdict: Literal["noise", "meaning", "bug"] = "bug" if bool(off.any()) else "meaning" if reads_as else "noise"
    first = int(off.nonzero()[0]) if verdict == "bug" else None
    return RolloutJudgement(
        verdict, None if verdict == "bug" else reads_as, first, reported, expected, floors, rollout.name
    )


def _forced(engine: Any, prompt: Prompt, tokens: tuple[int, ...], seed: int) -> torch.Tensor:
    """Logits `[tokens, vocab]` in float64, from which each token was chosen."""
    positions = prompt.position_ids
    fed = tokens[:-1]
    if positions is not None:
        further = (positions.amax() + 1 + torch.arange(len(fed))).expand(*positions.shape[:-1], len(fed))
        positions = torch.cat([positions, further], dim=-1)
    whole = prompt.replace(input_ids=[*prompt.input_ids, *fed], position_ids=positions)
    engine.check(whole)
    states: dict[str, torch.Tensor] = {}
    rows = torch.arange(len(prompt) - 1, len(whole))
    engine.run_seed(whole, ["logits"], rows, seed, lambda tap, state: states.update({tap: state.cpu().double()}))
    return states["logits"]


def _chosen(logits: torch.Tensor, rollout: Rollout, temperature: float) -> torch.Tensor:
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs[torch.arange(len(logprobs)), torch.tensor(rollout.token_ids)]


def _truncated(logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """Log-probabilities among the tokens that top-k and top-p leave, which sum to one again."""
    scores = logits / rollout.temperature
    order = scores.argsort(dim=-1, descending=True)
    ranked = scores.gather(-1, order)
    if rollout.top_k:
        ranked[:, rollout.top_k :] = -torch.inf
    before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)
    ranked = ranked.masked_fill(before >= rollout.top_p, -torch.inf)
    kept = torch.full_like(scores, -torch.inf).scatter(-1, order, ranked)
    return torch.log_softmax(kept, dim=-1)[torch.arange(len(kept)), torch.tensor(rollout.token_ids)]


_Read = Callable[[torch.Tensor], torch.Tensor]


def _readings(rollout: Rollout) -> Iterator[tuple[str | None, _Read]]:
    """What the numbers can mean, the expected meaning first: of the whole distribution at the temperature they were sampled at."""
    yield None, lambda logits: _chosen(logits, rollout, rollout.temperature)
    if rollout.temperature != 1:
        yield (
            f"raw, before temperature {rollout.temperature:g} (vLLM's `raw_logprobs`)",
            lambda logits: _chosen(logits, rollout, 1.0),
        )
    if rollout.top_p < 1 or rollout.top_k:
        yield (
            f"renormalised over the tokens that top_p={rollout.top_p:g}, top_k={rollout.top_k} leave",
            lambda logits: _truncated(logits, rollout),
        )
    if len(rollout.token_ids) > 2:
        yield "one token late: number i belongs to token i - 1", lambda logits: _moved(logits, rollout, 1)
        yield "one token early: number i belongs to token i + 1", lambda logits: _moved(logits, rollout, -1)


def _moved(logits: torch.Tensor, rollout: Rollout, by: int) -> torch.Tensor:
    """The numbers of the tokens beside; NaN where there is none."""
    moved = _chosen(logits, rollout, rollout.temperature).roll(by)
    moved[0 if by > 0 else -1] = torch.nan
    return moved


def _other_prompts(model: Model, prompt: Prompt) -> Iterator[tuple[str, Prompt]]:
    """The prompt with and without the token that begins a sequence, which a template or a tokenizer may add or not."""
    if prompt.embedding_ranges:
        return
    begin = getattr(model.text_config, "bos_token_id", None)
    if not isinstance(begin, int):
        return
    ids = prompt.input_ids
    if ids[0] == begin and len(ids) > 1:
        name = "those of the prompt without its first token, the beginning of a sequence"
        yield name, prompt.replace(input_ids=ids[1:])
    yield "those of the prompt with one more token that begins a sequence", prompt.replace(input_ids=[begin, *ids])
