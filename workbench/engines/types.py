"""Inputs and outputs of engines: settings, statuses, outputs. Names and defaults are LMDeploy's."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator

from ..schema import Flag, Integer, Integers, Number, Settings, between, checked_settings


def _is_seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise ValueError("it must be from 0 to 2**63 - 1")
    return value


def _is_choice(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or value not in ("all", "generation")):
        raise ValueError("use 'all', 'generation' or None")
    return value


class ResponseType(enum.Enum):
    """The status of an output, named as in LMDeploy.

    Engines here yield SUCCESS, FINISH, CANCEL and SESSION_REPEAT (the session id is in use); other failures raise.
    """

    SUCCESS = enum.auto()
    FINISH = enum.auto()
    CANCEL = enum.auto()
    ENGINE_STOP_ERROR = enum.auto()
    SESSION_REPEAT = enum.auto()
    SESSION_NOT_EXIST = enum.auto()
    INPUT_LENGTH_ERROR = enum.auto()
    INTERNAL_ENGINE_ERROR = enum.auto()


class _Settings(Settings):
    """The types and bounds of `GenerationConfig`."""

    max_new_tokens: Annotated[Integer, between(0)]
    min_new_tokens: Annotated[Integer, between(0)] | None
    do_sample: Flag
    top_p: Annotated[Number, between(0, 1)]
    top_k: Annotated[Integer, between(0)]
    min_p: Annotated[Number, between(0, 1)]
    temperature: Annotated[Number, between(0, 2)]
    repetition_penalty: Annotated[Number, between(1e-6)]
    ignore_eos: Flag
    random_seed: Annotated[Integer, AfterValidator(_is_seed)] | None
    stop_token_ids: Integers | None
    bad_token_ids: Integers | None
    logprobs: Annotated[Integer, between(0)] | None
    output_logits: Annotated[str | None, BeforeValidator(_is_choice)]
    output_last_hidden_state: Annotated[str | None, BeforeValidator(_is_choice)]


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings; names and defaults are LMDeploy's.

    Attributes:
        max_new_tokens: 0 runs only the prompt, for its states.
        min_new_tokens: stop tokens are not chosen before this many tokens.
        do_sample: False is greedy decoding; then top_p, top_k (0: no limit), min_p, temperature and random_seed have no effect.
        random_seed: None draws a new seed for each request.
        stop_token_ids: end the generation, in addition to the model's end-of-sequence ids; a stop token is not returned.
        bad_token_ids: are never chosen.
        logprobs: number of most likely tokens to report with each new token; the chosen token is always included.
        output_logits, output_last_hidden_state: which rows to return: "all" (every prompt token and every new token that is run) or
            "generation" (only the rows from which a new token is chosen).

    Raises:
        ValueError: a value of the wrong type or out of bounds.
    """

    max_new_tokens: int = 512
    min_new_tokens: int | None = None
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _Settings.model_fields}
        for name, value in checked_settings(_Settings, given):
            object.__setattr__(self, name, value)

    def check_tokens(self, vocab_size: int) -> None:
        """Raise ValueError if a stop or bad token id is outside the vocabulary, or if every token is banned."""
        for name in ("stop_token_ids", "bad_token_ids"):
            outside = [token for token in getattr(self, name) or () if not 0 <= token < vocab_size]
            if outside:
                raise ValueError(f"{name} contains {outside[0]}, outside the vocabulary of {vocab_size}")
        if len(set(self.bad_token_ids or ())) >= vocab_size:
            raise ValueError(f"bad_token_ids bans all {vocab_size} tokens: leave at least one")


@dataclass(frozen=True)
class EngineOutput:
    """The output of one step of a stream; it contains only what is new since the previous output.

    Attributes:
        status: SUCCESS while more outputs follow, then FINISH or CANCEL; SESSION_REPEAT alone if the session id is in use.
        token_ids: new tokens of this step, without a stop token.
        logprobs: for each of `token_ids`, {token: natural log probability}.
        logits: `[rows, vocab]` float32; the first step also has the prompt's rows if "all" was requested.
        last_hidden_state: `[rows, hidden]`, after the final norm; the prompt's rows as for `logits`.
        num_token: tokens generated so far.
    """

    status: ResponseType
    token_ids: list[int] = field(default_factory=list)
    num_token: int = 0
    logprobs: list[dict[int, float]] | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass(frozen=True)
class Capabilities:
    """What an engine supports with its model; prompts that need more are rejected.

    Attributes:
        name: the engine's kind, as in `open_engine`.
        taps: names of the hidden states that `trace` can keep, in the order in which they are computed.
        dtypes, devices: what it can be opened with.
        accepts_embeddings: whether prompts may have `input_embeddings`.
        bidirectional_spans: whether the tokens of a span can attend bidirectionally.
        mrope: the number of axes of `position_ids`: 3 with M-RoPE, 0 if they are plain `[seq]`.
        deepstack: whether it adds deepstack features after the first layers.
        vision_inside: whether it runs the vision model itself, on images (`MultimodalPrompt`).
    """

    name: str
    taps: tuple[str, ...]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    accepts_embeddings: bool = True
    bidirectional_spans: bool = True
    mrope: int = 0
    deepstack: bool = False
    vision_inside: bool = False


def join_outputs(outputs: Iterable[EngineOutput]) -> EngineOutput:
    """Merge all outputs of one stream (at least one) into a single output with the last one's status."""
    steps = list(outputs)

    def rows(name: str) -> torch.Tensor | None:
        parts = [part for step in steps if (part := getattr(step, name)) is not None]
        return torch.cat(parts) if parts else None

    logprobs = [entry for step in steps for entry in step.logprobs or ()]
    return EngineOutput(
        steps[-1].status,
        [token for step in steps for token in step.token_ids],
        steps[-1].num_token,
        logprobs if any(step.logprobs is not None for step in steps) else None,
        rows("logits"),
        rows("last_hidden_state"),
    )
