"""Choosing the next token from logits, and the loop that turns a model into a stream of tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from ..errors import ModelError
from ..prompt import Prompt
from .messages import EngineOutput, GenerationConfig, ResponseType


class Sampler:
    """Next tokens of one request; its random numbers depend on the request's seed alone."""

    def __init__(self, config: GenerationConfig, prompt_ids: Sequence[int], stops: frozenset[int]) -> None:
        self.config = config
        self.stops = stops
        self.seen = set(prompt_ids)
        self.generator = torch.Generator()
        if config.random_seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(config.random_seed)

    def next(self, logits: torch.Tensor, made: int) -> tuple[int, dict[int, float] | None]:
        """Choose from `logits` `[vocab]` float32 on the CPU; return the token and the log probabilities asked for."""
        config = self.config
        token = _largest(logits)
        if torch.isnan(logits[token]):  # NaN counts as the largest
            raise ModelError(
                f"the logits of new token {made} hold NaN: the model overflows in this dtype, or its weights are NaN"
            )
        adjusted = self._adjust(logits, made)
        if config.do_sample and config.temperature > 1e-5:
            chances, ids = self._candidates(adjusted)
            token = int(ids[torch.multinomial(chances, 1, generator=self.generator)])
        elif adjusted is not logits:
            token = _largest(adjusted)
        logits = adjusted
        self.seen.add(token)
        if config.logprobs is None:
            return token, None
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(config.logprobs, len(logprobs)))
        report = dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        report[token] = float(logprobs[token])
        return token, report

    def _adjust(self, logits: torch.Tensor, made: int) -> torch.Tensor:
        """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858), banned tokens, and no stop before the minimum."""
        config = self.config
        too_early = made < (config.min_new_tokens or 0) and bool(self.stops)
        if config.repetition_penalty == 1.0 and not config.bad_token_ids and not too_early:
            return logits
        logits = logits.clone()
        if config.repetition_penalty != 1.0:
            seen = torch.tensor([token for token in self.seen if 0 <= token < len(logits)], dtype=torch.long)
            penalty = config.repetition_penalty
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if config.bad_token_ids:
            logits[list(config.bad_token_ids)] = -torch.inf
        if too_early:
            logits[list(self.stops)] = -torch.inf
        return logits

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens to draw from, likeliest first, and their chances: temperature, then top-k, top-p (Holtzman et al. 2019,
        arXiv:1904.09751) and min-p, in that order."""
        config = self.config
        count = config.top_k if 0 < config.top_k < len(logits) else len(logits)
        ordered, ids = (logits / config.temperature).topk(count)
        chances = ordered.softmax(dim=-1)
        if config.top_p < 1.0:
            chances[chances.cumsum(dim=-1) - chances > config.top_p] = 0.0  # the token that crosses top_p stays
        if config.min_p > 0.0:
            chances[chances < config.min_p * chances[0]] = 0.0
        return chances, ids


def _largest(logits: torch.Tensor) -> int:
    """NumPy's argmax takes a tenth of the time of torch's on a vocabulary, which counts where many requests decode."""
    return int(logits.numpy().argmax())


class Run(Protocol):
    """One request inside an engine: both calls return `(logits [rows, vocab], hidden [rows, hidden])` for new tokens."""

    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]: ...

    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def stop_tokens(model, config: GenerationConfig) -> frozenset[int]:
    """The ids that end this request: the model's end-of-sequence ids and the request's own."""
    eos = model.text_config.eos_token_id
    own = [] if config.ignore_eos or eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset([*own, *(config.stop_token_ids or ())])


class Answer:
    """What one request says, token by token.

    Attributes:
        made: tokens said so far; `token`: the last one chosen; `finished`: whether there will be more.
    """

    def __init__(self, prompt: Prompt, config: GenerationConfig, stops: frozenset[int]) -> None:
        inside = {position for start, stop in prompt.embedding_ranges for position in range(start, stop)}
        said = [
            token for position, token in enumerate(prompt.input_ids) if position not in inside
        ]  # placeholders are not words
        self.config, self.stops = config, stops
        self.made, self.token, self.finished = 0, -1, False
        self._sampler = Sampler(config, said, stops)

    @property
    def wants_all(self) -> bool:
        """Whether the states of every prompt token are asked for."""
        return "all" in (self.config.output_logits, self.config.output_last_hidden_state)

    def take(self, logits: torch.Tensor, hidden: torch.Tensor) -> EngineOutput:
        """Choose the next token from the last of `logits` `[rows, vocab]`; `hidden` `[rows, hidden]`.

        With max_new_tokens=0 none is chosen: the output holds the prompt's own states.
        """
        config = self.config
        asked = _asked(logits, config.output_logits), _asked(hidden, config.output_last_hidden_state)
        if config.max_new_tokens == 0:
            self.finished = True
            return EngineOutput(ResponseType.FINISH, [], 0, None, *asked)
        self.token, logprobs = self._sampler.next(logits[-1].float().cpu(), self.made)
        stopped = self.token in self.stops
        self.made += not stopped
        self.finished = stopped or self.made == config.max_new_tokens
        return EngineOutput(
            ResponseType.FINISH if self.finished else ResponseType.SUCCESS,
            [] if stopped else [self.token],
            self.made,
            None if logprobs is None else [] if stopped else [logprobs],
            *asked,
        )


def generate(
    run: Run, prompt: Prompt, config: GenerationConfig, stops: frozenset[int]
) -> Generator[EngineOutput, None, None]:
    """Prefill, then one token a step until a stop token or the limit."""
    answer = Answer(prompt, config, stops)
    yield answer.take(*run.prefill(all_logits=config.output_logits == "all"))
    while not answer.finished:
        yield answer.take(*run.decode(answer.token))


def _asked(states: torch.Tensor, extent: str | None) -> torch.Tensor | None:
    if extent is None:
        return None
    states = (states if extent == "all" else states[-1:]).float().cpu()
    # Whoever keeps a row must not keep a whole step of everybody's.
    shared = states.untyped_storage().nbytes() > states.nbytes or states.is_pinned()
    return states.clone() if shared else states
