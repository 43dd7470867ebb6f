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
        if logits.isnan().any():
            raise ModelError(
                f"the logits of new token {made} hold NaN: the model overflows in this dtype, or its weights are NaN"
            )
        logits = self._adjust(logits.clone(), made)
        if config.do_sample and config.temperature > 1e-5:
            token = int(torch.multinomial(self._probabilities(logits), 1, generator=self.generator))
        else:
            token = int(logits.argmax())
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
        if config.repetition_penalty != 1.0:
            seen = torch.tensor([token for token in self.seen if 0 <= token < len(logits)], dtype=torch.long)
            penalty = config.repetition_penalty
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if config.bad_token_ids:
            logits[list(config.bad_token_ids)] = -torch.inf
        if made < (config.min_new_tokens or 0) and self.stops:
            logits[list(self.stops)] = -torch.inf
        return logits

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, then top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p, in that order."""
        config = self.config
        logits = logits / config.temperature
        if 0 < config.top_k < len(logits):
            logits[logits < logits.topk(config.top_k).values[-1]] = -torch.inf
        probabilities = logits.softmax(dim=-1)
        if config.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered > config.top_p  # the token that crosses top_p stays
            probabilities[order[beyond]] = 0.0
        if config.min_p > 0.0:
            probabilities[probabilities < config.min_p * probabilities.max()] = 0.0
        return probabilities


class Run(Protocol):
    """One request inside an engine: both calls return `(logits [rows, vocab], hidden [rows, hidden])` for new tokens."""

    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]: ...

    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def stop_tokens(model, config: GenerationConfig) -> frozenset[int]:
    """The ids that end this request: the model's end-of-sequence ids and the request's own."""
    eos = model.text_config.eos_token_id
    own = [] if config.ignore_eos or eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset([*own, *(config.stop_token_ids or ())])


def generate(
    run: Run, prompt: Prompt, config: GenerationConfig, stops: frozenset[int]
) -> Generator[EngineOutput, None, None]:
    """Prefill, then one token a step until a stop token or the limit."""
    inside = {position for start, stop in prompt.embedding_ranges for position in range(start, stop)}
    said = [
        token for position, token in enumerate(prompt.input_ids) if position not in inside
    ]  # placeholders are not words
    sampler = Sampler(config, said, stops)
    logits, hidden = run.prefill(all_logits=config.output_logits == "all")
    for made in range(1, config.max_new_tokens + 1):
        token, logprobs = sampler.next(logits[-1].float().cpu(), made - 1)
        stopped = token in stops
        yield EngineOutput(
            ResponseType.FINISH if stopped or made == config.max_new_tokens else ResponseType.SUCCESS,
            [] if stopped else [token],
            made - stopped,
            None if logprobs is None else [] if stopped else [logprobs],
            _asked(logits, config.output_logits),
            _asked(hidden, config.output_last_hidden_state),
        )
        if stopped or made == config.max_new_tokens:
            return
        logits, hidden = run.decode(token)
    yield EngineOutput(  # max_new_tokens=0: the prompt's own states, no token
        ResponseType.FINISH,
        logits=_asked(logits, config.output_logits),
        last_hidden_state=_asked(hidden, config.output_last_hidden_state),
    )


def _asked(states: torch.Tensor, extent: str | None) -> torch.Tensor | None:
    if extent is None:
        return None
    return (states if extent == "all" else states[-1:]).float().cpu()
