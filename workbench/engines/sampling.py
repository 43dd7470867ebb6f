"""Sampling of the next token from logits, and the loop that generates a stream of tokens."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from ..errors import ModelError
from ..prompt import Prompt
from .sampling_rows import RowSettings, on_device, sample_rows, uniform
from .types import EngineOutput, GenerationConfig, ResponseType


class Sampler:
    """Chooses the tokens of one request; its random numbers depend only on the request's seed, not on other requests or the device.

    Args:
        prompt_ids: tokens of the prompt, to which the repetition penalty applies.
        stops: ids that end the request; they are not chosen before `min_new_tokens`.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Sequence[int], stops: frozenset[int]) -> None:
        self.config = config
        self.stops = stops
        self.seen = set(prompt_ids)
        self.seed = secrets.randbits(63) if config.random_seed is None else config.random_seed
        self._seen_on_device: torch.Tensor | None = None

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
        if self.samples:
            token = int(sample_rows(adjusted[None], [self.settings(num_generated)]))
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

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random; else the likeliest is taken."""
        return self.config.do_sample and self.config.temperature > 1e-5

    def settings(self, num_generated: int) -> RowSettings:
        """What `sample_rows` needs to choose the token after `num_generated` new ones."""
        config = self.config
        return RowSettings(
            config.temperature, config.top_k, config.top_p, config.min_p, uniform(self.seed, num_generated)
        )

    def changes_logits(self, num_generated: int) -> bool:
        """Whether a penalty, a ban or the minimum length changes the logits after `num_generated` new tokens."""
        config = self.config
        too_early = num_generated < (config.min_new_tokens or 0) and bool(self.stops)
        return config.repetition_penalty != 1.0 or bool(config.bad_token_ids) or too_early

    def adjust_on_device(self, logits: torch.Tensor, num_generated: int) -> torch.Tensor:
        """`_adjust` for logits `[vocab]` on a GPU, where the tokens seen so far are kept as a mask; `see_on_device` adds to it."""
        config = self.config
        logits = logits.clone()
        if config.repetition_penalty != 1.0:
            if self._seen_on_device is None:
                known = [token for token in self.seen if 0 <= token < len(logits)]
                # Not in a caller's inference mode: another thread writes to it outside of that.
                with torch.inference_mode(False):
                    mask = torch.zeros(len(logits), dtype=torch.bool)
                    mask[known] = True
                    self._seen_on_device = on_device(mask, logits.device)
            penalty = config.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen_on_device, changed, logits)
        banned = [*(config.bad_token_ids or ())]
        if num_generated < (config.min_new_tokens or 0):
            banned += self.stops
        if banned:
            logits[on_device(torch.tensor(banned), logits.device)] = -torch.inf
        return logits

    def see_on_device(self, token: torch.Tensor) -> None:
        """Take note of a token, int64 `[1]` on the GPU, that was chosen there."""
        if self._seen_on_device is not None:
            self._seen_on_device[token] = True

    def forget_device(self) -> None:
        """Drop what is known on the device, after a step there was dropped whose token may be chosen again."""
        self._seen_on_device = None

    def _adjust(self, logits: torch.Tensor, num_generated: int) -> torch.Tensor:
        """Apply the repetition penalty (Keskar et al. 2019, arXiv:1909.05858), banned tokens and the minimum length."""
        config = self.config
        if not self.changes_logits(num_generated):
            return logits
        too_early = num_generated < (config.min_new_tokens or 0) and bool(self.stops)
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
        self.sampler = Sampler(config, text_ids, stops)

    @property
    def wants_all_states(self) -> bool:
        """Whether logits or hidden states of every prompt token are requested."""
        return "all" in (self.config.output_logits, self.config.output_last_hidden_state)

    @property
    def needs_logits(self) -> bool:
        """Whether the host needs more than the chosen token: to report log probabilities, or to return logits or states."""
        config = self.config
        reported = config.logprobs is not None or config.output_logits or config.output_last_hidden_state
        return bool(reported or config.max_new_tokens == 0)

    def next_token(self, token: int) -> EngineOutput:
        """`next_output` for a request that does not need logits.

        Args:
            token: the one that was chosen on the device; -1 if the logits contain NaN.

        Raises:
            ModelError: the logits contain NaN.
        """
        if token < 0:
            raise nan_in_logits(self.num_generated)
        self.token = token
        self.sampler.seen.add(token)
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
        self.token, logprobs = self.sampler.next(logits[-1].float().cpu(), self.num_generated)
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
