"""The interface every engine has, which is LMDeploy's: code written for `async_stream_infer` runs here unchanged."""

from __future__ import annotations

import asyncio
import operator
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch

from ..errors import EmbeddingRangeError, ModelError, PromptError, TraceError
from ..models import Model
from ..progress import Progress, counted
from ..prompt import MultimodalPrompt, Prompt
from ..provenance import provenance_of
from ..taps import select_taps
from ..trace import Trace, TracePlan
from ..trace_files import TraceWriter
from .cancellation import Cancellation
from .messages import Capabilities, EngineOutput, GenerationConfig, ResponseType, join_outputs

TAPS = ("embed", "layers.*", "norm", "logits")
Keep = Callable[[str, torch.Tensor], object]


class Engine(ABC):
    """A language model that takes prompts with spliced embeddings.

    Subclasses compute (`_generate`, `_trace`); this class checks input before any work starts, so that a fault in one
    request leaves the engine and every other request as they were.
    """

    model: Model
    dtype: torch.dtype
    device: torch.device

    def __init__(self) -> None:
        self._sessions: dict[int, Cancellation] = {}
        # Made, but no step taken yet; an entry goes when its generator does.
        self._waiting: WeakValueDictionary[int, Cancellation] = WeakValueDictionary()
        self._sessions_lock = threading.Lock()

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Taps, dtypes and devices of this engine with this model."""

    @abstractmethod
    def _generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        """Yield outputs for a checked prompt; an engine that waits asks `cancelled` to wake it, and returns."""

    async def _async_generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        """`_generate` for an event loop; here each step runs in a worker thread.

        A task that is cancelled during a step leaves once the step has ended; the request is then closed.
        """
        steps = self._generate(prompt, config, cancelled)
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

    @abstractmethod
    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, keep: Keep) -> None:
        """Run a checked prompt and hand each tap's states `[positions, width]` to `keep(tap, states)` as they come."""

    def lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        """The logit lens: states `[n, hidden]` of any layer read as if they were the last, `[n, vocab]` logits.

        `normed`: they have passed the final norm already (tap "norm").

        The final norm and the head on a residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").

        Raises:
            ModelError: this engine does not give out its head.
        """
        raise ModelError(f"{self.capabilities.name} does not give out its head: open 'numba' or 'transformers'")

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """Raise what makes this prompt impossible for this engine, before any work.

        Raises:
            EmbeddingRangeError, PromptError: see `Prompt.check`; also a prompt that does not fit the model's context.
        """
        config = self.model.text_config
        if isinstance(prompt, MultimodalPrompt) and not self.capabilities.vision_inside:
            raise PromptError(
                f"{self.capabilities.name} has no vision model inside, so it takes no multimodal=: compute the features with "
                "workbench.load_vision_tower, give them as input_embeddings (build_prompt does both), or open "
                "'transformers-multimodal'"
            )
        prompt.check(vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        for number, item in enumerate(prompt.input_embeddings):
            overflows = ~torch.isfinite(item.to(self.dtype)).all(dim=1)
            if overflows.any():
                row = int(overflows.nonzero()[0])
                raise EmbeddingRangeError(
                    f"input_embeddings[{number}], row {row}, holds {float(item[row].abs().max()):.3g}, which overflows in the "
                    f"engine's {str(self.dtype).removeprefix('torch.')}: scale the rows, or run the engine in a wider dtype"
                )
        if prompt.bidirectional and not self.capabilities.bidirectional_spans:
            raise EmbeddingRangeError(f"{self.capabilities.name} has no bidirectional attention: make the spans causal")
        if len(prompt) + new_tokens > self.model.context:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed the model's context of "
                f"{self.model.context}: shorten the prompt or lower max_new_tokens"
            )
        if prompt.deepstack and not self.capabilities.deepstack:
            raise EmbeddingRangeError(
                f"{self.capabilities.name} with {config.model_type} adds no features after the first layers: leave deepstack "
                "empty, or use an engine and a model that have it (Qwen3-VL in 'transformers')"
            )
        if prompt.position_ids is not None:
            if prompt.position_ids.ndim == 2 and not self.capabilities.mrope:
                raise PromptError(
                    f"position_ids [3, seq] are for M-RoPE, which {self.capabilities.name} with {config.model_type} does not "
                    "have: give [seq]"
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
        multimodal: Sequence[dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> Generator[EngineOutput, None, None]:
        """Generate from token ids with embeddings spliced in; each new token comes once.

        Args:
            session_id: a number of the caller's, for `cancel`; one request a number at a time.
            input_embedding_ranges: LMDeploy's keyword for `embedding_ranges`.
            multimodal: processed pictures, for engines that run the vision model inside (LMDeploy's PyTorch engine since 0.6.5,
                "transformers-multimodal" here); others refuse them.

        Raises:
            EmbeddingRangeError, PromptError: at the call, not at the first token. Unknown keywords raise TypeError; engines
                that swallow them answer from the placeholders.
        """
        if unknown:
            raise TypeError(f"stream_infer does not take {', '.join(sorted(unknown))}")
        ranges = _one_of(embedding_ranges, input_embedding_ranges)
        return self.stream(_prompt(input_ids, input_embeddings, ranges, multimodal), gen_config, session_id=session_id)

    def async_stream_infer(
        self,
        session_id: int,
        input_ids: Sequence[int],
        input_embeddings: Sequence[torch.Tensor] | None = None,
        embedding_ranges: Sequence[tuple[int, int]] | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        input_embedding_ranges: Sequence[tuple[int, int]] | None = None,
        multimodal: Sequence[dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> AsyncGenerator[EngineOutput, None]:
        """`stream_infer` for an event loop."""
        if unknown:
            raise TypeError(f"async_stream_infer does not take {', '.join(sorted(unknown))}")
        ranges = _one_of(embedding_ranges, input_embedding_ranges)
        prompt = _prompt(input_ids, input_embeddings, ranges, multimodal)
        return self.async_stream(prompt, gen_config, session_id=session_id)

    def stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, session_id: int | None = None
    ) -> Generator[EngineOutput, None, None]:
        """`stream_infer` for a Prompt, which also carries spans and positions."""
        config, cancelled = self._accept(prompt, gen_config, session_id)
        return self._steps(prompt, config, session_id, cancelled)

    def async_stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, session_id: int | None = None
    ) -> AsyncGenerator[EngineOutput, None]:
        """`stream` for an event loop."""
        config, cancelled = self._accept(prompt, gen_config, session_id)
        return self._async_steps(prompt, config, session_id, cancelled)

    def _accept(
        self, prompt: Prompt, gen_config: GenerationConfig | None, session_id: int | None
    ) -> tuple[GenerationConfig, Cancellation]:
        """Check a request before any work; from now on it can be cancelled."""
        config = gen_config or GenerationConfig()
        room = self.model.context - len(prompt)
        if gen_config is None and 0 < room < config.max_new_tokens:
            config = GenerationConfig(max_new_tokens=room)
        self.check(prompt, config.max_new_tokens)
        config.check_tokens(self.model.text_config.vocab_size)
        cancelled = Cancellation()
        if session_id is not None:
            with self._sessions_lock:
                self._waiting[session_id] = cancelled
        return config, cancelled

    def _steps(
        self, prompt: Prompt, config: GenerationConfig, session_id: int | None, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        with self._session(session_id, cancelled) as mine:
            if not mine:
                yield EngineOutput(ResponseType.SESSION_REPEAT)
                return
            made = 0
            steps = self._generate(prompt, config, cancelled)
            try:
                while not cancelled.is_set():
                    output = next(steps, None)
                    if output is None or cancelled.is_set():
                        break
                    made = output.num_token
                    yield output
                    if output.status is not ResponseType.SUCCESS:
                        return
            finally:
                steps.close()
            if cancelled.is_set():
                yield EngineOutput(ResponseType.CANCEL, num_token=made)

    async def _async_steps(
        self, prompt: Prompt, config: GenerationConfig, session_id: int | None, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        with self._session(session_id, cancelled) as mine:
            if not mine:
                yield EngineOutput(ResponseType.SESSION_REPEAT)
                return
            made = 0
            steps = self._async_generate(prompt, config, cancelled)
            try:
                async for output in steps:
                    if cancelled.is_set():
                        break
                    made = output.num_token
                    yield output
                    if output.status is not ResponseType.SUCCESS:
                        return
                    if cancelled.is_set():
                        break
            finally:
                await steps.aclose()
            if cancelled.is_set():
                yield EngineOutput(ResponseType.CANCEL, num_token=made)

    @contextmanager
    def _session(self, session_id: int | None, cancelled: Cancellation) -> Iterator[bool]:
        """Hold a session number while a request runs; False where another request holds it."""
        mine = session_id is None or self._enter(session_id, cancelled)
        try:
            yield mine
        finally:
            if mine and session_id is not None:
                with self._sessions_lock:
                    self._sessions.pop(session_id, None)

    def _enter(self, session_id: int, cancelled: Cancellation) -> bool:
        """Take a session number for a request's first step; False where another request holds it."""
        with self._sessions_lock:
            if self._waiting.get(session_id) is cancelled:
                del self._waiting[session_id]
            if session_id in self._sessions:
                return False
            self._sessions[session_id] = cancelled
            return True

    def cancel(self, session_id: int) -> bool:
        """Stop a request, before its first step or after its current one; returns whether there was one."""
        with self._sessions_lock:
            event = self._sessions.get(session_id) or self._waiting.get(session_id)
        if event is not None:
            event.set()
        return event is not None

    def create_instance(self) -> Engine:
        """LMDeploy's spelling: an instance is what has `stream_infer` and `async_stream_infer`."""
        return self

    def generate(self, prompt: Prompt, gen_config: GenerationConfig | None = None) -> EngineOutput:
        """Run to the end and return everything in one output."""
        return join_outputs(self.stream(prompt, gen_config))

    def plan_trace(
        self, prompt: Prompt, taps: Iterable[str] = TAPS, positions: slice | Sequence[int] = slice(None)
    ) -> TracePlan:
        """What `trace` with the same arguments would keep; `.nbytes` says how much that is. Nothing runs.

        Raises:
            ValueError: a tap this engine does not have, or a position outside the prompt.
        """
        chosen = select_taps(self.capabilities.taps, taps, self.capabilities.name)
        kept = _choose(positions, len(prompt))
        config = self.model.text_config
        widths = {"logits": config.vocab_size}
        return TracePlan({tap: (len(kept), widths.get(tap, config.hidden_size)) for tap in chosen}, kept, self.dtype)

    def trace(
        self,
        prompt: Prompt,
        taps: Iterable[str] = TAPS,
        positions: slice | Sequence[int] = slice(None),
        *,
        path: str | Path | None = None,
        max_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Run the prompt once and keep named hidden states.

        Args:
            taps: names or patterns; `*` stands for one part of a name, so `layers.*` is the residual stream after every
                layer and `layers.*.*` what attention and MLP add.
            positions: which tokens to keep.
            path: write the states to this file while the engine runs, instead of holding them in memory, and open it.
            max_bytes: refuse to keep more. Without it, more than half of the free memory (of the free disk with `path`) is refused.
            progress: called after each tap with the share of taps that are there; what it raises stops the run.

        Raises:
            ValueError: a tap this engine does not have, or a position outside the prompt.
            TraceError: more states than there is room for, or a file that cannot be written.
        """
        self.check(prompt)
        plan = self.plan_trace(prompt, taps, positions)
        if max_bytes is not None:
            plan.check_room(max_bytes, "into max_bytes", "")
        elif path is None:
            plan.check_room(psutil.virtual_memory().available // 2, "into half of the free memory", ", or give path=")
        else:
            plan.check_room(_free_disk(Path(path)), "into half of the free disk", "")
        provenance = provenance_of(
            prompt, engine=self.capabilities.name, model=self.model, dtype=self.dtype, device=self.device,
            words=path is not None,
        )  # fmt: skip
        chosen = list(plan.shapes)
        if path is not None:
            with TraceWriter(path, plan.shapes, plan.dtype, plan.positions, provenance) as writer:
                self._trace(prompt, chosen, plan.positions, counted(writer.write, progress, len(chosen)))
            return Trace.load(path)
        states: dict[str, torch.Tensor] = {}

        def keep(tap: str, state: torch.Tensor) -> None:
            states[tap] = state.cpu()

        self._trace(prompt, chosen, plan.positions, counted(keep, progress, len(chosen)))
        return Trace({tap: states[tap] for tap in chosen}, plan.positions, provenance)


def _one_of(ranges: Any, theirs: Any) -> Any:
    """The ranges, by this project's keyword or by LMDeploy's."""
    if ranges is not None and theirs is not None:
        raise EmbeddingRangeError("embedding_ranges and input_embedding_ranges are two names of one thing: give one")
    return ranges if ranges is not None else theirs


def _prompt(input_ids: Any, embeddings: Any, ranges: Any, multimodal: Any) -> Prompt:
    prompt = Prompt(input_ids, () if embeddings is None else embeddings, () if ranges is None else ranges)
    return prompt if multimodal is None else MultimodalPrompt.of(prompt, multimodal)


def _choose(positions: slice | Sequence[int], length: int) -> torch.Tensor:
    """Prompt positions as int64 `[kept]`, negative ones counted from the end."""
    every = torch.arange(length)
    if isinstance(positions, slice):
        kept = every[positions]
    else:
        try:
            wanted = [operator.index(position) for position in positions]
        except TypeError as error:
            raise ValueError(f"positions={positions!r}: give a slice or a list of integers") from error
        outside = [position for position in wanted if not -length <= position < length]
        if outside:
            raise ValueError(f"positions {outside} leave the prompt of {length} tokens")
        kept = every[wanted]
    if not len(kept):
        raise ValueError(f"positions={positions!r} keep none of the {length} tokens")
    return kept


def _free_disk(path: Path) -> int:
    try:
        return shutil.disk_usage(path.resolve().parent).free // 2
    except OSError as error:
        raise TraceError(f"the trace cannot be written to {path}: {error}") from error
