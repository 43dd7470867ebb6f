"""Sampling of the next token from logits, and the loop that generates a stream of tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from ..errors import ModelError
from ..prompt import Prompt
from .types import EngineOutput, GenerationConfig, ResponseType


class Sampler:
    """Chooses the tokens of one request; its random numbers depend only on the request's seed, not on other requests.

    Args:
        prompt_ids: tokens of the prompt, to which the repetition penalty applies.
        stops: ids that end the request; they are not chosen before `min_new_tokens`.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Sequence[int], stops: frozenset[int]) -> None:
        self.config = config
        self.stops = stops
        self.seen = set(prompt_ids)
        self.generator = torch.Generator()
        if config.random_seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(config.random_seed)

    def next(self, logits: torch.Tensor, num_generated: int) -> tuple[int, dict[int, float] | None]:
        """Choose the next token from `logits` `[vocab]`, float32 on the CPU, after `num_generated` new tokens.

        Returns:
            the token, and `{token: natural log probability}` of the likeliest tokens and the chosen one (None if not requested).

        Raises:
            ModelError: the logits contain NaN.
        """
        config = self.config
        token = _argmax(logits)
        if torch.isnan(logits[token]):  # argmax treats NaN as the largest
            raise nan_in_logits(num_generated)
        adjusted = self._adjust(logits, num_generated)
        if config.do_sample and config.temperature > 1e-5:
            probabilities, ids = self._candidates(adjusted)
            token = int(ids[torch.multinomial(probabilities, 1, generator=self.generator)])
        elif adjusted is not logits:
            token = _argmax(adjusted)
        logits = adjusted
        self.seen.add(token)
        if config.logprobs is None:
            return token, None
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(config.logprobs, len(logprobs)))
        report = dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        report[token] = float(logprobs[token])
        return token, report

    def _adjust(self, logits: torch.Tensor, num_generated: int) -> torch.Tensor:
        """Apply the repetition penalty (Keskar et al. 2019, arXiv:1909.05858), banned tokens and the minimum length."""
        config = self.config
        too_early = num_generated < (config.min_new_tokens or 0) and bool(self.stops)
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
        """Return probabilities and ids of the candidates, most likely first.

        Temperature, then top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p, in that order.
        """
        config = self.config
        count = config.top_k if 0 < config.top_k < len(logits) else len(logits)
        ordered, ids = (logits / config.temperature).topk(count)
        probabilities = ordered.softmax(dim=-1)
        if config.top_p < 1.0:  # the token that crosses top_p stays
            probabilities[probabilities.cumsum(dim=-1) - probabilities > config.top_p] = 0.0
        if config.min_p > 0.0:
            probabilities[probabilities < config.min_p * probabilities[0]] = 0.0
        return probabilities, ids


def nan_in_logits(num_generated: int) -> ModelError:
    """The error of a request whose logits contain NaN after `num_generated` new tokens."""
    return ModelError(
        f"the logits of new token {num_generated} contain NaN: the model overflows in this dtype, or its weights are NaN"
    )


def _argmax(logits: torch.Tensor) -> int:
    """Index of the largest logit. NumPy is ten times as fast as torch for `[vocab]`, which matters if many requests decode."""
    return int(logits.numpy().argmax())


class Run(Protocol):
    """The forward passes of one request, for `generate`: `prefill` runs the prompt, `decode` one new token.

    Both return `(logits [rows, vocab], hidden [rows, hidden])`, hidden after the final norm; the last row predicts the next token.
    Prefill returns the hidden states of all prompt tokens, and logits of all of them only with `all_logits`, else of the last.
    """

    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]: ...

    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def stop_tokens(model, config: GenerationConfig) -> frozenset[int]:
    """The ids that end a request: the model's end-of-sequence ids (unless `ignore_eos`) and the request's `stop_token_ids`."""
    return frozenset([*(() if config.ignore_eos else model.stop_token_ids), *(config.stop_token_ids or ())])


class GenerationState:
    """The state of one request's generation: chooses each next token and decides when to stop.

    Attributes:
        num_generated: number of new tokens, without a stop token.
        token: the token chosen last; -1 before the first.
        finished: whether a stop token or `max_new_tokens` was reached.
    """

    def __init__(self, prompt: Prompt, config: GenerationConfig, stops: frozenset[int]) -> None:
        inside = {position for start, stop in prompt.embedding_ranges for position in range(start, stop)}
        text_ids = [
            token for position, token in enumerate(prompt.input_ids) if position not in inside
        ]  # placeholders do not count for the repetition penalty
        self.config, self.stops = config, stops
        self.num_generated, self.token, self.finished = 0, -1, False
        self._sampler = Sampler(config, text_ids, stops)

    @property
    def wants_all_states(self) -> bool:
        """Whether logits or hidden states of every prompt token are requested."""
        return "all" in (self.config.output_logits, self.config.output_last_hidden_state)

    @property
    def needs_logits(self) -> bool:
        """Whether more than the likeliest token is needed: to sample, to change or report logits, or to return states."""
        config = self.config
        early = self.num_generated < (config.min_new_tokens or 0) and bool(self.stops)
        sampled = config.do_sample and config.temperature > 1e-5
        reported = config.logprobs is not None or config.output_logits or config.output_last_hidden_state
        changed = config.repetition_penalty != 1.0 or bool(config.bad_token_ids) or early
        return bool(sampled or reported or changed or config.max_new_tokens == 0)

    def next_token(self, token: int) -> EngineOutput:
        """`next_output` for a request that does not need logits.

        Args:
            token: the likeliest one; -1 if the logits contain NaN.

        Raises:
            ModelError: the logits contain NaN.
        """
        if token < 0:
            raise nan_in_logits(self.num_generated)
        self.token = token
        return self._output(None)

    def next_output(self, logits: torch.Tensor, hidden: torch.Tensor) -> EngineOutput:
        """Choose the next token from the last row of `logits` `[rows, vocab]`, and return it with the requested logits and states.

        `hidden` is `[rows, hidden]`, after the final norm. With max_new_tokens=0 no token is chosen: the output contains only states.

        Raises:
            ModelError: the logits contain NaN.
        """
        config = self.config
        states = _requested(logits, config.output_logits), _requested(hidden, config.output_last_hidden_state)
        if config.max_new_tokens == 0:
            self.finished = True
            return EngineOutput(ResponseType.FINISH, [], 0, None, *states)
        self.token, logprobs = self._sampler.next(logits[-1].float().cpu(), self.num_generated)
        return self._output(logprobs, *states)

    def _output(self, logprobs: dict[int, float] | None, *states: torch.Tensor | None) -> EngineOutput:
        stopped = self.token in self.stops
        self.num_generated += not stopped
        self.finished = stopped or self.num_generated == self.config.max_new_tokens
        return EngineOutput(
            ResponseType.FINISH if self.finished else ResponseType.SUCCESS,
            [] if stopped else [self.token],
            self.num_generated,
            None if logprobs is None else [] if stopped else [logprobs],
            *states,
        )


def generate(
    run: Run, prompt: Prompt, config: GenerationConfig, stops: frozenset[int]
) -> Generator[EngineOutput, None, None]:
    """Prefill, then decode one token per step until a stop token or `max_new_tokens`; yield one output per step."""
    state = GenerationState(prompt, config, stops)
    yield state.next_output(*run.prefill(all_logits=config.output_logits == "all"))
    while not state.finished:
        yield state.next_output(*run.decode(state.token))


def _requested(states: torch.Tensor, extent: str | None) -> torch.Tensor | None:
    if extent is None:
        return None
    states = (states if extent == "all" else states[-1:]).float().cpu()
    # Clone: keeping a row must not keep the memory of a whole step with all its requests.
    shared = states.untyped_storage().nbytes() > states.nbytes or states.is_pinned()
    return states.clone() if shared else states
