"""The Numba engine: many requests at once over a paged KV cache, behind the workbench's engine interface."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

import psutil
import torch

from ...errors import EmbeddingRangeError, ModelError, PromptError
from ...models import Model
from ...models.options import parse_device, parse_dtype
from ...models.sizes import check_sizes
from ...prompt import Prompt
from ...prompt.packing import plan_batch
from ...schema import shortened
from ...trace.patch import Patches
from ...trace.taps import decoder_taps
from ..base import Engine, Sink
from ..cancellation import Cancellation
from ..sampling import GenerationState, stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig, ResponseType, join_outputs
from .architectures import AttentionBlocks
from .block_manager import BlockManager
from .decoder import Decoder
from .loop import Loop
from .model_runner import ModelRunner
from .ops import CpuHalfOperations
from .request import Request
from .scheduler import Scheduler
from .stats import EngineStats, Step

DTYPES = ("float32", "bfloat16", "float16")
_CANCELLED = object()


class NumbaEngine(Engine):
    """This project's engine: continuous batching, a paged KV cache and the attention kernels of `range_kernels`, on the CPU or a GPU.

    It provides every tap, that is, every named hidden state of the forward pass (see `trace.taps`).

    In float32 on the CPU a request's results are bit-identical regardless of the other requests in the batch, of how its prompt is
    cut into chunks, and of whether its prefix came from the prefix cache. In other dtypes and on GPUs matrix products are torch's,
    whose rounding may depend on the number of rows, unless `deterministic` is set.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        max_batch_size: requests that run at once; further requests wait. On models with linear attention each takes the memory of its
            states (Qwen3.5: 50 MiB).
        max_prefill_token_num: tokens per step (one forward pass), of decoding requests and prompt chunks together. Prompts are cut
            into chunks to fit; only a bidirectional span, which must run in one step, may exceed it.
        cache_block_seq_len: tokens per page of the KV cache: 32, 64, 128 or 256.
        cache_max_entry_count: the cache's size: a fraction of the memory that is free now (float), or a number of pages (int).
        enable_prefix_caching: keep the pages of finished requests by content, so that an equal prefix (token ids and injected rows)
            is not computed again.
        packed_decode: for bfloat16 on the CPU: keep a second copy of the layers' weights, in the layout of the native kernels; a decode
            step then takes a third of the time. It computes in float32 and rounds at the end.
        deterministic: no bit of a request's results may depend on the other requests. On the CPU that is so in float32, and no other
            dtype is accepted; on a GPU it needs bfloat16 and a model without sliding windows and linear attention, and costs speed
            (`data/bench/README.md`). A trace is bit-identical to the prefill of the same prompt.
        eager_mode: True launches every kernel from Python. False replays decode steps as CUDA graphs if they run on tensor cores:
            on a GPU in float16 or bfloat16, with a head size of `range_kernels`' paged decode.

    `eager_mode` is named as in LMDeploy's `PytorchEngineConfig`, the others but `packed_decode` and `deterministic` as in its
    `TurbomindEngineConfig`.

    Raises:
        ModelError: an architecture or setting of the model that this engine does not support, or no GPU for device="cuda".
        ValueError: an invalid argument.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        max_batch_size: int = 64,
        max_prefill_token_num: int = 512,
        cache_block_seq_len: int = 32,
        cache_max_entry_count: float | int = 0.2,
        enable_prefix_caching: bool = True,
        packed_decode: bool = False,
        deterministic: bool = False,
        eager_mode: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = parse_dtype(dtype, DTYPES, "numba")
        self.device = parse_device(device, "numba")
        for name, value in (("max_batch_size", max_batch_size), ("max_prefill_token_num", max_prefill_token_num)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give an integer of at least 1")
        if packed_decode and (self.dtype is not torch.bfloat16 or self.device.type != "cpu"):
            raise ValueError(
                f"packed_decode is for bfloat16 on the CPU, not for {str(self.dtype).removeprefix('torch.')} on {self.device.type}, "
                "whose decode steps are fast without it: leave it out"
            )
        check_sizes(model.config, model.weights, model.name)
        if deterministic and self.device.type == "cpu" and self.dtype is not torch.float32:
            raise ValueError(
                f"deterministic=True on the CPU needs dtype='float32', not {str(self.dtype).removeprefix('torch.')!r}: its products are torch's"
            )
        self.runner = ModelRunner(model, self.dtype, self.device, deterministic)
        self._config = self.runner.decoder.config
        if packed_decode and not self._config.plain:
            raise ValueError(
                f"packed_decode: the native layers do not compute those of {self._config.family!r}: leave it out"
            )
        if packed_decode:
            self.decoder.ops = CpuHalfOperations()
        pages = self._count_pages(cache_max_entry_count, cache_block_seq_len, max_batch_size)
        self._page_size = cache_block_seq_len
        self._blocks = BlockManager(pages)
        scheduler = Scheduler(
            self._blocks, cache_block_seq_len, max_batch_size, max_prefill_token_num, enable_prefix_caching,
            invariant=deterministic and self.device.type != "cpu",
        )  # fmt: skip
        cache = self.decoder.new_pages(pages, cache_block_seq_len, max_batch_size)
        self.decoder.whole_layers = self._config.plain and not eager_mode
        if not eager_mode:
            self.runner.capture_decode_steps(cache)
        self._loop = Loop(self.runner, cache, scheduler)

    @property
    def decoder(self) -> Decoder:
        """The model's weights and its forward pass."""
        return self.runner.decoder

    def _release(self) -> None:
        self._loop.stop()
        del self.runner, self._loop, self._blocks

    def _count_pages(self, size: float | int, page_size: int, max_batch_size: int) -> int:
        if (
            isinstance(size, bool)
            or not isinstance(size, int | float)
            or size <= 0
            or (isinstance(size, float) and size >= 1)
        ):
            raise ValueError(
                f"cache_max_entry_count={size!r}: give a fraction of the free memory between 0 and 1, or a number of pages"
            )
        on_cpu = self.device.type == "cpu"
        free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info(self.device)[0]
        config = self._config
        states = 0 if config.delta_net is None else config.delta_net.state_bytes * max_batch_size
        if states > free:
            raise ValueError(
                f"max_batch_size={max_batch_size}: the states of linear attention take {states / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB "
                "are free: lower it"
            )
        free -= states
        page = (
            2
            * config.attention_layers
            * page_size
            * config.kv_heads
            * config.head_dim
            * (4 if on_cpu else self.dtype.itemsize)
        )
        if isinstance(size, int):
            if size * page > free:
                raise ValueError(
                    f"cache_max_entry_count={shortened(size)}: {shortened(size)} pages of {page_size} tokens take "
                    f"{size * page / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are free: give at most {free // page} pages, or a "
                    "fraction of the free memory"
                )
            return size
        max_pages = max_batch_size * -(-self.decoder.context // page_size)
        return max(min(int(size * free / page), max_pages), 1)

    @property
    def capabilities(self) -> Capabilities:
        config = self._config
        return Capabilities(
            "numba",
            decoder_taps(config.layers),
            DTYPES,
            ("cpu", "cuda"),
            mrope=3 if config.mrope else 0,
            deepstack=config.deepstack,
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; also rejects a request that can never fit into the KV cache."""
        super().check(prompt, new_tokens)
        blocks = any(isinstance(window, AttentionBlocks) for window in self._config.windows)
        if (blocks or self._config.delta_net) and any(span.attention == "bidirectional" for span in prompt.spans or ()):
            kind = "whose attention ends at blocks (attention_chunk_size)" if blocks else "with linear attention"
            raise EmbeddingRangeError(
                f"{self.model.name!r} has layers {kind}: bidirectional spans are not defined there; leave the spans' attention causal"
            )
        # The last token chosen is not run through the model.
        needed = -(-(len(prompt) + max(new_tokens - 1, 0)) // self._page_size)
        if needed > self._blocks.pages:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones take {needed} pages of {self._page_size} tokens, and the KV "
                f"cache has {self._blocks.pages}: raise cache_max_entry_count, or lower max_new_tokens"
            )

    def stats(self) -> EngineStats:
        """A snapshot of queue, batch, KV cache and speed. Any thread may call it."""
        return self._loop.stats()

    @property
    def history(self) -> list[Step]:
        """The last 4096 steps (forward passes), oldest first: which tokens of which request ran, and how long it took."""
        return list(self._loop.counters.history)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, except for pages that running requests use. Any thread may call it."""
        with self._loop._lock:
            self._blocks.forget()

    def make_request(self, prompt: Prompt, config: GenerationConfig, deliver: Callable[[Any], None]) -> Request:
        """Create a request for `Loop.submit`.

        Args:
            deliver: called with each EngineOutput, or with the exception that ended the request, in the thread that runs the step.
        """
        state = GenerationState(prompt, config, stop_tokens(self.model, config))
        request = Request(prompt, state, deliver)
        # Rope scalings such as dynamic NTK depend on the total length: beyond the limit, equal prefixes have different keys.
        limits = [rope.limit for rope in self._config.ropes if rope is not None and rope.limit is not None]
        # States of linear attention are not kept with pages.
        request.shareable = self._config.delta_net is None and all(
            len(prompt) + config.max_new_tokens <= limit for limit in limits
        )
        return request

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        channel: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = self._loop  # `close` drops the attribute while this generator may still be suspended
        request = self.make_request(prompt, config, channel.put)
        cancelled.add_callback(lambda: channel.put(_CANCELLED))
        loop.submit(request, alone=True)
        try:
            while True:
                while channel.empty() and loop.step_alone():
                    pass
                output = _unwrap(channel.get())
                if output is None:
                    return
                yield output
                if output.status is not ResponseType.SUCCESS:
                    return
        finally:
            loop.abort(request)

    def generate(self, prompt: Prompt, gen_config: GenerationConfig | None = None) -> EngineOutput:
        """See `Engine.generate`. The calling thread wakes up once, when the request has ended, and not at every token."""
        prompt, config, _ = self._accept(prompt, gen_config, None)
        outputs: list[Any] = []
        ended = threading.Event()

        def deliver(output: Any) -> None:
            outputs.append(output)
            if isinstance(output, BaseException) or output.status is not ResponseType.SUCCESS:
                ended.set()

        loop = self._loop
        request = self.make_request(prompt, config, deliver)
        loop.submit(request, alone=True)
        try:
            while not ended.is_set() and loop.step_alone():
                pass
            ended.wait()
        finally:
            loop.abort(request)
        return join_outputs(each for each in map(_unwrap, outputs) if each is not None)

    async def run_generation_async(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        events = asyncio.get_running_loop()
        channel: asyncio.Queue[Any] = asyncio.Queue()

        def deliver(output: Any) -> None:
            with suppress(RuntimeError):  # the consumer's event loop is closed: nobody waits for the output
                events.call_soon_threadsafe(channel.put_nowait, output)

        loop = self._loop  # as in `run_generation`
        request = self.make_request(prompt, config, deliver)
        cancelled.add_callback(lambda: deliver(_CANCELLED))
        loop.submit(request)
        try:
            while (output := _unwrap(await channel.get())) is not None:
                yield output
                if output.status is not ResponseType.SUCCESS:
                    return
        finally:
            loop.abort(request)

    def logit_lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        states = states.to(self.device, self.dtype)
        return self.decoder.logits(states if normed else self.decoder.normalise(states))

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        self._trace(prompt, taps, positions, sink, Patches({}))

    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink, patches: Patches) -> None:
        wanted, rows = set(taps), positions.to(self.device)

        def tap(name: str, state: torch.Tensor) -> torch.Tensor:
            state = patches.apply(name, state)
            if name in wanted:
                sink(name, state[rows])
            return state

        hidden = self.runner.run_alone([Request(prompt)], [[(0, 0, len(prompt))]], self._page_size, tap)[0]
        if "logits" in wanted:
            sink("logits", self.decoder.logits(hidden[rows]))

    def run_patched(
        self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink, patches: Patches
    ) -> None:
        if "run_batch" in vars(self.runner):
            raise ModelError("an engine with a fault in its batches takes no patches: open it again without the fault")
        self._trace(prompt, taps, positions, sink, patches)

    def prefill_packed(self, prompts: Sequence[Prompt], max_tokens: int = 2048) -> list[torch.Tensor]:
        """Run several prompts packed end to end, without padding, as planned by `plan_batch(prompts, max_tokens)`.

        They run in the calling thread and in KV pages of their own, without scheduler and prefix cache.

        Args:
            max_tokens: tokens per forward pass.

        Returns:
            for each prompt the hidden state of its last token after the final norm, `[hidden]`, which predicts the first new token.

        Raises:
            PromptError: a prompt cannot run, or a bidirectional range is longer than `max_tokens`; no prompt has run.
        """
        for prompt in prompts:
            self.check(prompt)
        plan = plan_batch(prompts, max_tokens)
        steps = [[(chunk.prompt, chunk.start, chunk.stop) for chunk in batch] for batch in plan.batches]
        states = self.runner.run_alone([Request(prompt) for prompt in prompts], steps, self._page_size)
        return [state[-1] for state in states]


def _unwrap(delivered: Any) -> EngineOutput | None:
    """Return a delivered output, or None if the request was cancelled; raise a delivered error."""
    if isinstance(delivered, BaseException):
        raise ModelError(str(delivered)) from delivered
    return None if delivered is _CANCELLED else delivered
