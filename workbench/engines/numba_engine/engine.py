"""The Numba engine: many requests at once over a paged KV cache, behind the workbench's engine interface."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import psutil
import torch

from ...batches import plan_batch
from ...errors import ModelError, PromptError
from ...models import Model
from ...prompt import Prompt
from ...taps import decoder_taps
from ..api import Engine, Keep
from ..cancellation import Cancellation
from ..messages import Capabilities, EngineOutput, GenerationConfig, ResponseType
from ..options import parse_device, parse_dtype
from ..sampling import Answer, stop_tokens
from . import sequence as requests
from .batch import Batch
from .blocks import BlockManager
from .captured import CapturedSteps
from .decoder import Decoder, Tap
from .loop import Loop
from .scheduler import Scheduler
from .stats import EngineStats, Step

DTYPES = ("float32", "bfloat16", "float16")
_CANCELLED = object()


class NumbaEngine(Engine):
    """Continuous batching over `range_kernels`, on the CPU or a GPU; it gives every tap.

    In float32 on the CPU a request's results are bit for bit the same whoever else is in the batch, however its prompt is cut into
    chunks, and whether its beginning came from the prefix cache. In other dtypes and on GPUs matrix products are torch's, whose
    rounding may depend on the number of rows.

    Args:
        max_batch_size: requests that run at once; more wait.
        max_prefill_token_num: token budget of a step.
        cache_block_seq_len: tokens a page of the KV cache holds: 32, 64, 128 or 256.
        cache_max_entry_count: the cache's size: a share of the memory that is free now (float), or a number of pages (int).
        enable_prefix_caching: keep pages by content, so that an equal beginning, images included, is not computed again.
        eager_mode: launch every kernel of a decode step from Python, as those of all other steps. Else a GPU replays decode steps as
            CUDA graphs, where they run on tensor cores: float16 and bfloat16, head sizes of `range_kernels`' paged decode.

    The names are those of LMDeploy's `TurbomindEngineConfig` and, the last, of its `PytorchEngineConfig`.
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
        eager_mode: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = parse_dtype(dtype, DTYPES, "numba")
        self.device = parse_device(device, "numba")
        for name, value in (("max_batch_size", max_batch_size), ("max_prefill_token_num", max_prefill_token_num)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give an integer of at least 1")
        self.decoder = Decoder(model, self.dtype, self.device)
        pages = self._count_pages(cache_max_entry_count, cache_block_seq_len, max_batch_size)
        self._page_size = cache_block_seq_len
        self._blocks = BlockManager(pages)
        scheduler = Scheduler(
            self._blocks, cache_block_seq_len, max_batch_size, max_prefill_token_num, enable_prefix_caching
        )
        cache = self.decoder.new_pages(pages, cache_block_seq_len)
        if not eager_mode and CapturedSteps.possible(self.decoder, cache):
            self.decoder.captured = CapturedSteps(cache, self.decoder.context)
        self._loop = Loop(self.decoder, cache, scheduler)

    def _count_pages(self, size: float | int, page_size: int, max_batch_size: int) -> int:
        if (
            isinstance(size, bool)
            or not isinstance(size, int | float)
            or size <= 0
            or (isinstance(size, float) and size >= 1)
        ):
            raise ValueError(
                f"cache_max_entry_count={size!r}: give a share of the free memory between 0 and 1, or a number of pages"
            )
        if isinstance(size, int):
            return size
        on_cpu = self.device.type == "cpu"
        free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info(self.device)[0]
        backbone = self.decoder.backbone
        page = 2 * backbone.layers * page_size * backbone.kv_heads * backbone.head_dim * self.dtype.itemsize
        most = max_batch_size * -(-self.decoder.context // page_size)
        return max(min(int(size * free / page), most), 1)

    @property
    def capabilities(self) -> Capabilities:
        backbone = self.decoder.backbone
        return Capabilities(
            "numba",
            decoder_taps(backbone.layers),
            DTYPES,
            ("cpu", "cuda"),
            mrope=bool(backbone.mrope),
            deepstack=backbone.deepstack,
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; also a request that the KV cache can never hold."""
        super().check(prompt, new_tokens)
        # The last token that is chosen is never computed from.
        needed = -(-(len(prompt) + max(new_tokens - 1, 0)) // self._page_size)
        if needed > self._blocks.pages:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones take {needed} pages of {self._page_size} tokens, and the KV "
                f"cache has {self._blocks.pages}: raise cache_max_entry_count, or lower max_new_tokens"
            )

    def stats(self) -> EngineStats:
        """Queue, batch, cache and speed, as they are now."""
        return self._loop.stats()

    @property
    def history(self) -> list[Step]:
        """The last steps: which tokens of which request ran, and how long it took."""
        return list(self._loop.counters.history)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache of what no request is using."""
        with self._loop._lock:
            self._blocks.forget()

    def _request(self, prompt: Prompt, config: GenerationConfig, deliver: Callable[[Any], None]) -> requests.Sequence:
        answer = Answer(prompt, config, stop_tokens(self.model, config))
        request = requests.Sequence(prompt, answer, deliver)
        # Where frequencies change with the length of the whole, equal beginnings have different keys.
        limits = [rope.limit for rope in self.decoder.backbone.ropes if rope is not None and rope.limit is not None]
        request.shareable = all(len(prompt) + config.max_new_tokens <= limit for limit in limits)
        return request

    def _generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        channel: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = self._request(prompt, config, channel.put)
        cancelled.tell(lambda: channel.put(_CANCELLED))
        self._loop.submit(request, alone=True)
        try:
            while True:
                while channel.empty() and self._loop.step_alone():
                    pass
                output = _opened(channel.get())
                if output is None:
                    return
                yield output
                if output.status is not ResponseType.SUCCESS:
                    return
        finally:
            self._loop.abort(request)

    async def _async_generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> AsyncGenerator[EngineOutput, None]:
        events = asyncio.get_running_loop()
        channel: asyncio.Queue[Any] = asyncio.Queue()

        def deliver(output: Any) -> None:
            events.call_soon_threadsafe(channel.put_nowait, output)

        request = self._request(prompt, config, deliver)
        cancelled.tell(lambda: deliver(_CANCELLED))
        self._loop.submit(request)
        try:
            while (output := _opened(await channel.get())) is not None:
                yield output
                if output.status is not ResponseType.SUCCESS:
                    return
        finally:
            self._loop.abort(request)

    def lens(self, states: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        states = states.to(self.device, self.dtype)
        return self.decoder.logits(states if normed else self.decoder.normalise(states))

    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, keep: Keep) -> None:
        wanted, rows = set(taps), positions.to(self.device)

        def tap(name: str, state: torch.Tensor) -> None:
            if name in wanted:
                keep(name, state[rows])

        hidden = self._run([requests.Sequence(prompt)], [[(0, 0, len(prompt))]], tap)[0]
        if "logits" in wanted:
            keep("logits", self.decoder.logits(hidden[rows]))

    def prefill_packed(self, prompts: Sequence[Prompt], max_tokens: int = 2048) -> list[torch.Tensor]:
        """Run several prompts packed end to end, no padding, by `plan_batch(prompts, max_tokens)`.

        Returns:
            for each prompt the hidden state of its last token after the final norm, `[hidden]`, which predicts the first new one.

        Raises:
            PromptError: a prompt that cannot run; none has run then.
        """
        for prompt in prompts:
            self.check(prompt)
        plan = plan_batch(prompts, max_tokens)
        steps = [[(piece.prompt, piece.start, piece.stop) for piece in chunk] for chunk in plan.chunks]
        states = self._run([requests.Sequence(prompt) for prompt in prompts], steps)
        return [state[-1] for state in states]

    def _run(
        self, sequences: list[requests.Sequence], steps: list[list[tuple[int, int, int]]], tap: Tap | None = None
    ) -> list[torch.Tensor]:
        """Run (sequence, start, stop) step by step in pages of their own; the last hidden states of each sequence."""
        size, first = self._page_size, 0
        for sequence in sequences:
            count = -(-len(sequence) // size)
            sequence.pages = list(range(first, first + count))
            first += count
        pages = self.decoder.new_pages(first, size)
        last: dict[int, torch.Tensor] = {}
        for step in steps:
            pieces = [(sequences[number], start, stop) for number, start, stop in step]
            batch = Batch.of(pieces, self.decoder.table, size, bool(self.decoder.backbone.mrope))
            hidden = self.decoder.forward(batch, pages, tap)
            parts = hidden.split([stop - start for _, start, stop in step])
            last |= {number: part for (number, _, _), part in zip(step, parts, strict=True)}
        return [last[number] for number in range(len(sequences))]


def _opened(delivered: Any) -> EngineOutput | None:
    """What the engine's thread handed over: an output, an error to raise, or None once the request is cancelled."""
    if isinstance(delivered, BaseException):
        raise ModelError(str(delivered)) from delivered
    return None if delivered is _CANCELLED else delivered
