"""The interface of every engine, modelled on LMDeploy: code written for `async_stream_infer` runs here unchanged."""

from __future__ import annotations

import asyncio
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from ..errors import EmbeddingRangeError, ModelError, PromptError, TraceError
from ..models import Model
from ..progress import Progress, counted
from ..prompt import MultimodalPrompt, Prompt
from ..prompt.checks import largest
from ..schema import shortened
from ..trace import Trace, TracePlan
from ..trace.files import TraceWriter
from ..trace.patch import Patch, Patches, check_patches
from ..trace.positions import choose_positions
from ..trace.provenance import provenance_of
from ..trace.taps import select_taps
from .cancellation import Cancellation
from .freed_memory import return_freed_memory
from .sessions import Sessions
from .types import Capabilities, EngineOutput, GenerationConfig, join_outputs

TAPS = ("embed", "layers.*", "norm", "logits")
"""The taps (named hidden states of the forward pass, see `trace.taps`) that `Engine.trace` keeps by default."""
Sink = Callable[[str, torch.Tensor], object]
"""Called as `sink(tap, states)`, with states `[positions, width]`."""


_engines_were_opened = False  # in this process, or in the one that it was forked from
_forked = False  # from a process that had opened engines


def _after_fork() -> None:
    global _forked
    _forked = _engines_were_opened


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Engine(ABC):
    """A language model that takes prompts with spliced embeddings.

    Subclasses compute (`run_generation`, `run_trace`). This class checks input before any work starts, so that an invalid
    request fails alone.

    Attributes:
        model: the model that it runs.
        dtype: of its hidden states and logits.
        device: the device that it runs on.
    """

    model: Model
    dtype: torch.dtype
    device: torch.device

    def __init__(self) -> None:
        global _engines_were_opened
        if _forked:
            raise ModelError(
                "this process was forked from one that had opened engines, whose threads and locks it lacks: start it with "
                "multiprocessing's 'spawn' method"
            )
        _engines_were_opened = True
        self._sessions = Sessions()
        self._closed = False
        self._process_id = os.getpid()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Release the engine's memory and threads; a second call does nothing.

        End or cancel all requests first. Requests after it raise ModelError.
        """
        if not self._closed:
            self._closed = True
            if self._process_id == os.getpid():  # in a forked child, threads and processes are the parent's
                self._release()
                return_freed_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _release(self) -> None:  # noqa: B027, engines without resources of their own release nothing
        """Release the subclass's resources; called once, by `close`."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this engine supports with this model: taps, dtypes, devices and kinds of prompts."""

    @abstractmethod
    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        """Generate from a prompt that `check` has accepted: yield one output per step, the last with status FINISH.

        After a step during which `cancelled` was set, the base class closes this generator. An engine that blocks while it waits
        for a step registers a callback with `cancelled` that wakes it, and then returns.
        """

    async def run_generation_async(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        """Async version of `run_generation`; this default runs each step in a worker thread.

        If the asyncio task that consumes it is cancelled during a step, it waits for the end of that step and then closes
        `run_generation`.
        """
        steps = self.run_generation(prompt, config, cancelled)
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
    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        """Run a prompt that `check` has accepted, once, and pass the states of each tap to `sink(tap, states)` as they are computed.

        Args:
            taps: names, without patterns.
            positions: int64 `[positions]`, the prompt positions whose states are passed on.
            sink: gets states `[positions, width]` in the engine's dtype; an exception that it raises stops the run.
        """

    def run_patched(
        self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink, patches: Patches
    ) -> None:
        """`run_trace` with the states of `patches` in the place of the run's own; the taps pass on the patched states.

        Raises:
            ModelError: this engine cannot replace states.
        """
        raise ModelError(f"{self.capabilities.name} does not take patches: open 'numba' or 'transformers'")

    def logit_lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        """The logit lens: apply the final norm and the head to states `[n, hidden]` of any layer; return logits `[n, vocab]`.

        Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

        Args:
            normed: whether the states are already after the final norm (tap "norm").

        Raises:
            ModelError: this engine does not expose its head.
        """
        raise ModelError(f"{self.capabilities.name} does not expose its head: open 'numba' or 'transformers'")

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """Check, before any work, that this engine can run this prompt and generate `new_tokens` tokens after it.

        Raises:
            EmbeddingRangeError: items or ranges that do not fit (see `Prompt.check`), rows that overflow in the engine's dtype, or
                bidirectional spans or deepstack features if the engine does not support them.
            PromptError: any other invalid prompt: longer than the model's context together with the new tokens, with images or
                M-RoPE positions that the engine does not take, ...
            ModelError: the engine was closed, or this process was forked from the one that opened it.
        """
        self._check_usable()
        config = self.model.text_config
        if isinstance(prompt, MultimodalPrompt) and not self.capabilities.vision_inside:
            raise PromptError(
                f"{self.capabilities.name} has no vision model inside, so it does not take multimodal=: compute the features with "
                "workbench.load_vision_tower and pass them as input_embeddings (build_prompt does both), or open "
                "'transformers-multimodal'"
            )
        prompt.check(vocab_size=config.vocab_size, hidden_size=config.hidden_size)
        for number, item in enumerate(prompt.input_embeddings):
            if item.dtype is self.dtype or largest(item) <= torch.finfo(self.dtype).max:
                continue
            overflows = ~torch.isfinite(item.to(self.dtype)).all(dim=1)
            if overflows.any():
                row = int(overflows.nonzero()[0])
                raise EmbeddingRangeError(
                    f"input_embeddings[{number}], row {row}, contains {float(item[row].abs().max()):.3g}, which overflows in the "
                    f"engine's {str(self.dtype).removeprefix('torch.')}: scale the rows, or run the engine in a wider dtype"
                )
        if prompt.bidirectional_ranges and not self.capabilities.bidirectional_spans:
            raise EmbeddingRangeError(f"{self.capabilities.name} has no bidirectional attention: make the spans causal")
        if len(prompt) + new_tokens > self.model.context:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed the model's context of "
                f"{self.model.context}: shorten the prompt or lower max_new_tokens"
            )
        if prompt.deepstack and not self.capabilities.deepstack:
            raise EmbeddingRangeError(
                f"{self.capabilities.name} with {config.model_type} does not add features after the first layers: leave "
                "deepstack empty, or use an engine and a model that support it (Qwen3-VL in 'transformers')"
            )
        if prompt.position_ids is not None:
            if prompt.position_ids.ndim == 2 and not self.capabilities.mrope:
                raise PromptError(
                    f"position_ids [{len(prompt.position_ids)}, seq] are for M-RoPE, which {self.capabilities.name} with {config.model_type} does not "
                    "use: give [seq]"
                )
            if prompt.position_ids.ndim == 2 and len(prompt.position_ids) != self.capabilities.mrope:
                raise PromptError(
                    f"position_ids have {len(prompt.position_ids)} axes; {self.capabilities.name} with {config.model_type} uses "
                    f"{self.capabilities.mrope}: give [{self.capabilities.mrope}, {len(prompt)}]"
                )
            if prompt.position_ids.min() < 0:
                raise PromptError(f"position_ids contains {int(prompt.position_ids.min())}: positions start at 0")

    def _check_usable(self) -> None:
        if self._closed:
            raise ModelError(f"this {self.capabilities.name} engine was closed: open it again")
        if self._process_id != os.getpid():
            raise ModelError(
                f"this {self.capabilities.name} engine was opened in process {self._process_id}, and this is a fork of it, in which its "
                "threads do not exist: open it in a process started with multiprocessing's 'spawn' method"
            )

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
        """Generate from token ids with embeddings spliced in; return a generator of outputs, which yields each new token once.

        Args:
            session_id: a number chosen by the caller, for `cancel`. Only one request may run per number: the stream of a second
                one is a single output with status SESSION_REPEAT.
            input_ids: token ids; those inside ranges are placeholders of any value.
            input_embeddings: items, each `[rows_i, hidden]`; item i replaces the token embeddings in range i.
            embedding_ranges: half-open `(start, stop)`, one per item, with `stop - start == rows_i`.
            gen_config: None means greedy decoding of up to 512 tokens, or of as many as the model's context has left.
            input_embedding_ranges: LMDeploy's keyword for `embedding_ranges`.
            multimodal: processed images, for engines that run the vision model inside (LMDeploy's PyTorch engine since 0.6.5,
                "transformers-multimodal" here); others reject them.

        Raises:
            EmbeddingRangeError, PromptError, ModelError: see `check`. Raised by the call itself, not at the first token.
            ValueError: a token id in `gen_config` that is outside the vocabulary.
            TypeError: an unknown keyword. Ignoring it could mean ignoring misspelt embeddings, and an answer from placeholders.
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
        """Async version of `stream_infer`."""
        if unknown:
            raise TypeError(f"async_stream_infer does not take {', '.join(sorted(unknown))}")
        ranges = _one_of(embedding_ranges, input_embedding_ranges)
        prompt = _prompt(input_ids, input_embeddings, ranges, multimodal)
        return self.async_stream(prompt, gen_config, session_id=session_id)

    def stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, session_id: int | None = None
    ) -> Generator[EngineOutput, None, None]:
        """`stream_infer` for a `Prompt`, which may also have spans, positions and deepstack features.

        Without `session_id` the request cannot be cancelled by `cancel`; closing the generator ends it.
        """
        prompt, config, cancelled = self._accept(prompt, gen_config, session_id)
        return self._sessions.stream(session_id, cancelled, self.run_generation(prompt, config, cancelled))

    def async_stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, session_id: int | None = None
    ) -> AsyncGenerator[EngineOutput, None]:
        """Async version of `stream`."""
        prompt, config, cancelled = self._accept(prompt, gen_config, session_id)
        return self._sessions.stream_async(session_id, cancelled, self.run_generation_async(prompt, config, cancelled))

    def _accept(
        self, prompt: Prompt, gen_config: GenerationConfig | None, session_id: int | None
    ) -> tuple[Prompt, GenerationConfig, Cancellation]:
        """Check a request before any work, and register it so that it can be cancelled; return a prompt with tensors of its own.

        Without `gen_config`, max_new_tokens is lowered to what the model's context has left.
        """
        if gen_config is not None and not isinstance(gen_config, GenerationConfig):
            raise ValueError(f"gen_config={shortened(gen_config)}: give a workbench.GenerationConfig")
        if session_id is not None and (isinstance(session_id, bool) or not hasattr(session_id, "__index__")):
            raise ValueError(f"session_id={shortened(session_id)}: it must be an integer")
        self._check_usable()
        config = gen_config or GenerationConfig()
        prompt = prompt.owned()
        remaining = self.model.context - len(prompt)
        if gen_config is None and 0 < remaining < config.max_new_tokens:
            config = GenerationConfig(max_new_tokens=remaining)
        self.check(prompt, config.max_new_tokens)
        config.check_tokens(self.model.text_config.vocab_size)
        return prompt, config, self._sessions.accept(session_id)

    def cancel(self, session_id: int) -> bool:
        """Stop a request before its first step or after its current one; return whether it existed. Any thread may call it.

        The request's stream ends with status CANCEL.
        """
        return self._sessions.cancel(session_id)

    def create_instance(self) -> Engine:
        """Return this engine itself, for code written for LMDeploy, which calls `stream_infer` on an instance."""
        return self

    def generate(self, prompt: Prompt, gen_config: GenerationConfig | None = None) -> EngineOutput:
        """Generate to the end and return all new tokens, and the requested logits and states, as one output."""
        return join_outputs(self.stream(prompt, gen_config))

    def plan_trace(
        self, prompt: Prompt, taps: Iterable[str] = TAPS, positions: slice | Sequence[int] = slice(None)
    ) -> TracePlan:
        """Return the shapes that `trace` would keep with these arguments, and their size (`.nbytes`), without running the model.

        Raises:
            ValueError: a tap this engine does not have, or a position outside the prompt.
        """
        chosen = select_taps(self.capabilities.taps, taps, self.capabilities.name)
        kept = choose_positions(positions, len(prompt))
        config = self.model.text_config
        widths = {"logits": config.vocab_size}
        return TracePlan({tap: (len(kept), widths.get(tap, config.hidden_size)) for tap in chosen}, kept, self.dtype)

    def trace(
        self,
        prompt: Prompt,
        taps: Iterable[str] = TAPS,
        positions: slice | Sequence[int] = slice(None),
        *,
        patches: Sequence[Patch] = (),
        path: str | Path | None = None,
        max_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Run the prompt once and keep the hidden states at the chosen taps (named points of the forward pass).

        Args:
            taps: names or patterns; `*` matches one part of a name, so `layers.*` is the residual stream after every
                layer and `layers.*.*` are the outputs that attention and MLP add to it.
            positions: the prompt positions to keep, as a slice or as indices; negative ones count from the end.
            patches: states that take the place of the run's own at a tap and some positions; what is computed after them follows from
                them, and the trace has the patched states. Such a trace is not compared with others (`compare` refuses it).
            path: write the states to this file during the run instead of keeping them in memory; the returned trace reads from it.
            max_bytes: limit of the states' total size; default: half of the free memory (with `path`, half of the free disk space).
            progress: called after each tap with the fraction of taps done; an exception that it raises stops the run.

        Raises:
            EmbeddingRangeError, PromptError, ModelError: see `check`.
            ValueError: a tap this engine does not have, or a position outside the prompt.
            TraceError: the states exceed `max_bytes`, the file cannot be written, or a patch does not fit (`trace.patch.check_patches`).
        """
        self.check(prompt)
        width = self.model.text_config.hidden_size
        checked = check_patches(patches, self.capabilities.taps, len(prompt), width, self.dtype) if patches else None
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
        run = self.run_trace
        if checked is not None:
            provenance["patches"] = checked.described()
            run = partial(self.run_patched, patches=checked)
        if path is not None:
            with TraceWriter(path, plan.shapes, plan.dtype, plan.positions, provenance) as writer:
                run(prompt, chosen, plan.positions, counted(writer.write, progress, len(chosen)))
            return Trace.load(path)
        states: dict[str, torch.Tensor] = {}

        def keep(tap: str, state: torch.Tensor) -> None:
            states[tap] = state.cpu()

        run(prompt, chosen, plan.positions, counted(keep, progress, len(chosen)))
        return Trace({tap: states[tap] for tap in chosen}, plan.positions, provenance)


def _one_of(ranges: Any, theirs: Any) -> Any:
    """Return the ranges, which are given either as `embedding_ranges` or by LMDeploy's keyword, `input_embedding_ranges`."""
    if ranges is not None and theirs is not None:
        raise EmbeddingRangeError("embedding_ranges and input_embedding_ranges name the same argument: pass only one")
    return ranges if ranges is not None else theirs


def _prompt(input_ids: Any, embeddings: Any, ranges: Any, multimodal: Any) -> Prompt:
    prompt = Prompt(input_ids, () if embeddings is None else embeddings, () if ranges is None else ranges)
    return prompt if multimodal is None else MultimodalPrompt.of(prompt, multimodal)


def _free_disk(path: Path) -> int:
    try:
        return shutil.disk_usage(path.resolve().parent).free // 2
    except OSError as error:
        raise TraceError(f"the trace cannot be written to {path}: {error}") from error
