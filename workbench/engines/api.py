"""The interface every engine has, which is LMDeploy's: code written for `async_stream_infer` runs here unchanged."""

from __future__ import annotations

import asyncio
import enum
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import EmbeddingRangeError, PromptError
from ..models import Model
from ..prompt import Prompt
from ..taps import select_taps
from ..trace import Trace


class ResponseType(enum.Enum):
    """LMDeploy's statuses."""

    SUCCESS = enum.auto()
    FINISH = enum.auto()
    CANCEL = enum.auto()
    ENGINE_STOP_ERROR = enum.auto()
    SESSION_REPEAT = enum.auto()
    SESSION_NOT_EXIST = enum.auto()
    INPUT_LENGTH_ERROR = enum.auto()
    INTERNAL_ENGINE_ERROR = enum.auto()


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; names and defaults are LMDeploy's.

    Attributes:
        logprobs: number of likeliest tokens to report with each new token, the chosen one always among them.
        output_logits, output_last_hidden_state: "all" for prompt and new tokens, "generation" for what predicts new ones.
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
        limits = {
            "max_new_tokens": (0, None),
            "min_new_tokens": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
            "min_p": (0, 1),
            "temperature": (0, 2),
            "repetition_penalty": (1e-6, None),
            "logprobs": (0, None),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not (least <= value and (most is None or value <= most)):
                bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
                raise ValueError(f"{name}={value}: it must be {bounds}")
        for name in ("output_logits", "output_last_hidden_state"):
            if getattr(self, name) not in (None, "all", "generation"):
                raise ValueError(f"{name}={getattr(self, name)!r}: use 'all', 'generation' or None")


@dataclass(frozen=True)
class EngineOutput:
    """What one step of a stream brings: each new token once.

    Attributes:
        status: SUCCESS while tokens come, then FINISH or CANCEL.
        token_ids: new tokens of this step; a stop token is not among them.
        logprobs: for each of `token_ids`, {token: natural log probability}.
        logits: `[rows, vocab]` float32; the first step brings the prompt's rows too when "all" was asked for.
        last_hidden_state: `[rows, hidden]`, after the final norm, likewise.
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
    """What an engine can do; nothing is guessed, what is not listed is refused."""

    name: str
    taps: tuple[str, ...]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    accepts_embeddings: bool = True
    bidirectional_spans: bool = True


class Engine(ABC):
    """A language model that takes prompts with spliced embeddings.

    Subclasses compute (`_generate`, `_trace`); this class checks input before any work starts, so that a fault in one
    request leaves the engine and every other request as they were.
    """

    model: Model
    dtype: torch.dtype
    device: torch.device

    def __init__(self) -> None:
        self._sessions: dict[int, threading.Event] = {}
        self._sessions_lock = threading.Lock()

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Taps, dtypes and devices of this engine with this model."""

    @abstractmethod
    def _generate(self, prompt: Prompt, config: GenerationConfig) -> Generator[EngineOutput, None, None]:
        """Yield outputs for a checked prompt."""

    @abstractmethod
    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `{tap: [positions, width]}` for a checked prompt."""

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """Raise what makes this prompt impossible for this engine, before any work.

        Raises:
            EmbeddingRangeError, PromptError: see `Prompt.check`; also a prompt that does not fit the model's context.
        """
        config = self.model.text_config
        prompt.check(vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        if prompt.bidirectional and not self.capabilities.bidirectional_spans:
            raise EmbeddingRangeError(f"{self.capabilities.name} has no bidirectional attention: make the spans causal")
        if len(prompt) + new_tokens > config.max_position_embeddings:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed the model's context of "
                f"{config.max_position_embeddings}: shorten the prompt or lower max_new_tokens"
            )
        if prompt.position_ids is not None:
            if prompt.position_ids.ndim == 2:
                raise PromptError(
                    f"position_ids [3, seq] are for M-RoPE, which {config.model_type} does not have: give [seq]"
                )
            if prompt.position_ids.min() < 0:
                raise PromptError(f"position_ids holds {int(prompt.position_ids.min())}: positions count from 0")

    def stream_infer(
        self,
        session_id: int,
        input_ids: Sequence[int],
        input_embeddings: Sequence[torch.Tensor] | None = None,
        embedding_ranges: Sequence[tuple[int, int]] | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        input_embedding_ranges: Sequence[tuple[int, int]] | None = None,
        **unknown: Any,
    ) -> Generator[EngineOutput, None, None]:
        """Generate from token ids with embeddings spliced in; each new token comes once.

        Args:
            session_id: a number of the caller's, for `cancel`; one request a number at a time.
            input_embedding_ranges: LMDeploy's keyword for `embedding_ranges`.

        Raises:
            EmbeddingRangeError, PromptError: at the call, not at the first token. Unknown keywords raise TypeError; engines
                that swallow them answer from the placeholders.
        """
        if unknown:
            raise TypeError(f"stream_infer does not take {', '.join(sorted(unknown))}")
        if embedding_ranges is not None and input_embedding_ranges is not None:
            raise EmbeddingRangeError(
                "embedding_ranges and input_embedding_ranges are two names of one thing: give one"
            )
        ranges = embedding_ranges if embedding_ranges is not None else input_embedding_ranges
        return self.stream(Prompt(input_ids, input_embeddings or (), ranges or ()), gen_config, session_id=session_id)

    async def async_stream_infer(self, *args: Any, **kwargs: Any) -> AsyncIterator[EngineOutput]:
        """`stream_infer` for an event loop: each step runs in a worker thread.

        A task that is cancelled during a step leaves once the step has ended; the request is then closed.
        """
        steps = self.stream_infer(*args, **kwargs)
        step: asyncio.Future[EngineOutput | None] | None = None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
                output = await asyncio.shield(step)
                if output is None:
                    return
                yield output
        finally:
            if step is not None and not step.done():
                await asyncio.wait([step])
            steps.close()

    def stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, session_id: int | None = None
    ) -> Generator[EngineOutput, None, None]:
        """`stream_infer` for a Prompt, which also carries spans and positions."""
        config = gen_config or GenerationConfig()
        room = self.model.text_config.max_position_embeddings - len(prompt)
        if gen_config is None and 0 < room < config.max_new_tokens:
            config = GenerationConfig(max_new_tokens=room)
        self.check(prompt, config.max_new_tokens)
        return self._session(prompt, config, session_id)

    def _session(
        self, prompt: Prompt, config: GenerationConfig, session_id: int | None
    ) -> Generator[EngineOutput, None, None]:
        cancelled = threading.Event()
        if session_id is not None:
            with self._sessions_lock:
                if session_id in self._sessions:
                    yield EngineOutput(ResponseType.SESSION_REPEAT)
                    return
                self._sessions[session_id] = cancelled
        made = 0
        try:
            for output in self._generate(prompt, config):
                made = output.num_token
                yield output
                if cancelled.is_set() and output.status is ResponseType.SUCCESS:
                    yield EngineOutput(ResponseType.CANCEL, num_token=made)
                    return
        finally:
            if session_id is not None:
                with self._sessions_lock:
                    self._sessions.pop(session_id, None)

    def cancel(self, session_id: int) -> bool:
        """Stop a running request after its current step; returns whether there was one."""
        with self._sessions_lock:
            event = self._sessions.get(session_id)
        if event is not None:
            event.set()
        return event is not None

    def create_instance(self) -> Engine:
        """LMDeploy's spelling: an instance is what has `stream_infer` and `async_stream_infer`."""
        return self

    def generate(self, prompt: Prompt, gen_config: GenerationConfig | None = None) -> EngineOutput:
        """Run to the end and return everything in one output."""
        return join_outputs(self.stream(prompt, gen_config))

    def trace(
        self,
        prompt: Prompt,
        taps: Iterable[str] = ("embed", "layers.*", "norm", "logits"),
        positions: slice | Sequence[int] = slice(None),
    ) -> Trace:
        """Run the prompt once and keep named hidden states.

        Args:
            taps: names or patterns; `*` stands for one part of a name, so `layers.*` is the residual stream after every
                layer and `layers.*.*` what attention and MLP add.
            positions: which tokens to keep.

        Raises:
            ValueError: a tap this engine does not have, or a position outside the prompt.
        """
        self.check(prompt)
        chosen = select_taps(self.capabilities.taps, taps, self.capabilities.name)
        every = torch.arange(len(prompt))
        try:
            kept = every[positions] if isinstance(positions, slice) else every[torch.as_tensor(positions)]
        except IndexError as error:
            raise ValueError(f"positions {positions} leave the prompt of {len(prompt)} tokens") from error
        return Trace(
            {tap: tensor.cpu() for tap, tensor in self._trace(prompt, chosen, kept).items()},
            positions=kept,
            prompt=prompt,
            engine=self.capabilities.name,
            model=self.model.name,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
        )


def join_outputs(outputs: Iterable[EngineOutput]) -> EngineOutput:
    """One output that holds what a stream brought piece by piece."""
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


def parse_dtype(name: str | torch.dtype, allowed: Sequence[str], engine: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`, refusing what the engine does not run in."""
    short = str(name).removeprefix("torch.")
    if short not in allowed:
        raise ValueError(f"dtype={short!r}: the {engine} engine runs in {', '.join(allowed)}")
    return getattr(torch, short)
