"""The engine loop: schedules and runs steps while requests are queued or running, and delivers their outputs."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

from ...errors import ModelError
from ...prompt.ranges import clip
from .cuda_graphs import DecodeResult
from .model_cache import ModelCache
from .model_runner import Chunk, ModelRunner, StepResult
from .request import Request
from .scheduler import ScheduledChunk, Scheduler
from .stats import Counters, EngineStats, Step, StepChunk


class Loop:
    """Runs the engine's steps (one forward pass over a batch each), in a thread of its own or in a caller's (`step_alone`).

    On a GPU a decode step is launched before the tokens of the step before are known on the host, if it is certain which requests run in
    it; outputs are delivered while it runs. A request that ends by a stop token has then run once more; what it computed is dropped.

    Any thread may submit and abort requests. A request's outputs are passed to its `deliver` in the thread that runs the step. The
    loop's thread is started on demand and ends when no request is left. If a forward pass fails, its requests run again one by one,
    and only those that fail again end with an error.

    Args:
        runner: runs the forward passes.
        pages: the KV cache.
        scheduler: chooses the tokens of each step; only this class calls it.
    """

    def __init__(self, runner: ModelRunner, pages: ModelCache, scheduler: Scheduler) -> None:
        self.runner, self.pages, self.scheduler = runner, pages, scheduler
        self.counters = Counters()
        self._lock = threading.Lock()  # guards the scheduler and the thread's start and end; never held during a step
        self._step_lock = threading.Lock()  # one step at a time; taken before the other lock
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._under_way: tuple[list[ScheduledChunk], DecodeResult] | None = None  # a launched step
        self._numbers = 0
        self._process_id = os.getpid()
        _LOOPS.add(self)

    def submit(self, request: Request, alone: bool = False) -> None:
        """Queue a request, and start the loop's thread if it is needed.

        Args:
            alone: the consumer calls `step_alone` while it waits for outputs, so no thread is started unless other requests exist.

        Raises:
            ModelError: the loop was stopped.
        """
        with self._lock:
            if self._stopping:
                raise ModelError("this numba engine was closed: open it again")
            request.number = self._numbers
            self._numbers += 1
            has_others = bool(self.scheduler.running or self.scheduler.waiting)
            self.scheduler.add(request)
            if self._thread is None and (has_others or not alone):
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="workbench-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop's thread after its current step, and wait for it. It is not started again.

        Requests that have not finished end with a ModelError.
        """
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._step_lock:
            self._drop_step_under_way()
            left = [*self.scheduler.running, *self.scheduler.waiting]
            self._fail(left, ModelError("the engine was closed before this request finished"))

    def step_alone(self) -> bool:
        """Run one step in the calling thread; return False if the loop's own thread runs the steps, or if nothing is left to run.

        This makes a single request faster: two threads that compute alternately slow down each other's worker pools.
        """
        with self._step_lock:
            with self._lock:
                if self._thread is not None:
                    return False
            return self._one_step()

    def abort(self, request: Request) -> None:
        """Drop a request and release its pages: immediately if no step is running, else before the next step. Any thread may call it."""
        request.aborted = True
        if self._step_lock.acquire(blocking=False):
            try:
                with self._lock:
                    self.scheduler.finish(request)
            finally:
                self._step_lock.release()

    def stats(self) -> EngineStats:
        """A snapshot of queue, KV cache and counters."""
        counters = self.counters
        with self._lock:
            scheduler, blocks = self.scheduler, self.scheduler.blocks
            return EngineStats(
                waiting=sum(not each.aborted for each in scheduler.waiting),
                running=sum(not each.aborted for each in scheduler.running),
                pages=blocks.pages,
                pages_used=blocks.used,
                pages_known=blocks.known,
                page_size=scheduler.page_size,
                prefix_hits=blocks.hits,
                prefix_misses=blocks.misses,
                evictions=blocks.evictions,
                preemptions=scheduler.preemptions,
                finished=counters.finished,
                prompt_tokens=counters.prompt_tokens,
                new_tokens=counters.new_tokens,
                tokens_per_second=counters.rate(),
                steps=counters.steps,
                step_seconds=counters.step_seconds,
                model_seconds=counters.model_seconds,
            )

    def _run(self) -> None:
        while not self._stopping:
            with self._step_lock:
                if not self._one_step():
                    return

    def _one_step(self) -> bool:
        """Schedule and run a step; return False if nothing is left to run. The loop's thread, if any, must then end."""
        began = time.perf_counter()
        under_way, self._under_way = self._under_way, None
        chunks: list[ScheduledChunk] = [] if under_way is None else under_way[0]
        try:
            if under_way is not None:
                self._finish_launched(*under_way, began)
                return True
            with self._lock:
                chunks = self.scheduler.schedule()
                if not chunks:
                    self._thread = None
                    return False
            launched = self._launch(chunks)
            if launched is None:
                self._step(chunks, began)
            else:
                self._finish_launched(chunks, launched, began)
        except BaseException as error:  # an error outside the forward pass: no consumer may wait forever
            scheduler = self.scheduler
            self._drop_step_under_way()
            self._fail([chunk.request for chunk in chunks] or [*scheduler.running, *scheduler.waiting], error)
            if isinstance(error, KeyboardInterrupt):  # raised in the caller's thread
                raise
        return True

    def _launch(self, chunks: Sequence[ScheduledChunk], after: Sequence[int] | None = None) -> DecodeResult | None:
        """Launch a decode step without waiting for it; None if it must be run by `_step`, or cannot be launched."""
        try:
            return self.runner.launch(
                [Chunk(chunk.request, chunk.start, chunk.stop) for chunk in chunks], self.pages, after
            )
        except Exception:  # `_step` runs it again, and names the request that fails
            return None

    def _drop_step_under_way(self) -> None:
        if self._under_way is not None:
            with suppress(Exception):
                self._under_way[1].tokens()
            for chunk in self._under_way[0]:
                if chunk.request.generation is not None:
                    chunk.request.generation.sampler.forget_device()
            self._under_way = None

    def _finish_launched(self, chunks: list[ScheduledChunk], launched: DecodeResult, began: float) -> None:
        """Launch the step after a launched one, if it is certain, and wait for the tokens of the launched one."""
        before = time.perf_counter()
        with self._lock:
            running = set(map(id, self.scheduler.running))
            live = [chunk for chunk in chunks if id(chunk.request) in running and not chunk.request.aborted]
            following = self.scheduler.ahead(live)
        if following:
            row_of = {id(chunk.request): row for row, chunk in enumerate(chunks)}
            ahead = self._launch(following, [row_of[id(chunk.request)] for chunk in following])
            self._under_way = None if ahead is None else (following, ahead)
        kept = set(map(id, live))
        pairs: list[tuple[ScheduledChunk, Any]]
        try:
            tokens = launched.tokens()
            named = zip(chunks, tokens, strict=True)
            pairs = [(chunk, StepResult(token, None, None)) for chunk, token in named if id(chunk) in kept]
        except Exception:
            self._drop_step_under_way()
            pairs = [(chunk, self._forward_alone(chunk)) for chunk in live]
        if pairs:
            self._complete_all(pairs, began, time.perf_counter() - before)

    def _step(self, chunks: list[ScheduledChunk], began: float) -> None:
        before = time.perf_counter()
        try:
            results: list[Any] = list(self._forward(chunks))
        except Exception:
            results = [self._forward_alone(chunk) for chunk in chunks]
        self._complete_all(list(zip(chunks, results, strict=True)), began, time.perf_counter() - before)

    def _complete_all(self, pairs: Sequence[tuple[ScheduledChunk, Any]], began: float, model_seconds: float) -> None:
        """Deliver the results of a step, and count it."""
        shown = tuple(_step_chunk(chunk, chunk.request.decoding) for chunk, _ in pairs)
        used = self.scheduler.blocks.used
        for chunk, result in pairs:
            if isinstance(result, Exception):
                self._fail([chunk.request], result)
            else:
                self._complete(chunk, result)
        now = time.perf_counter()
        self.counters.add(Step(shown, began - self.counters.started, now - began, model_seconds, used))

    def _forward(self, chunks: Sequence[ScheduledChunk]) -> list[StepResult]:
        return self.runner.step([Chunk(chunk.request, chunk.start, chunk.stop) for chunk in chunks], self.pages)

    def _forward_alone(self, chunk: ScheduledChunk) -> StepResult | Exception:
        """Run a chunk again after its step failed."""
        request = chunk.request
        if chunk.start and self.runner.decoder.config.delta_net is not None:
            # The failed step may have advanced the states of linear attention: begin with the first token.
            request.states.clear()
            chunk = ScheduledChunk(request, 0, chunk.stop)
        try:
            return self._forward([chunk])[0]
        except Exception as error:
            return error

    def _complete(self, chunk: ScheduledChunk, result: StepResult) -> None:
        """Record a chunk as computed; if it ends with the request's last known token, choose the next one."""
        request = chunk.request
        with self._lock:
            self.scheduler.advance(chunk)
        token, logits, hidden = result
        if request.wants_prompt_states and logits is not None and hidden is not None:
            request.states.append((logits, hidden))
        generation = request.generation
        if not chunk.last or request.aborted or generation is None:
            return
        if request.states:
            logits, hidden = (torch.cat(parts) for parts in zip(*request.states, strict=True))
            request.states.clear()
        try:
            if token is not None:
                output = generation.next_token(token)
            else:
                assert logits is not None
                assert hidden is not None
                output = generation.next_output(logits, hidden)
            if generation.finished:
                with self._lock:
                    self.scheduler.finish(request)
                    self.counters.finished += 1
            else:
                request.append_token(generation.token)
            request.deliver(output)
        except Exception as error:
            self._fail([request], error)

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        """End requests with an error."""
        if not isinstance(error, ModelError):
            wrapped = ModelError(f"the numba engine failed in this request: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        for request in requests:
            with self._lock:
                self.scheduler.finish(request)
            try:
                request.deliver(error)
            except Exception:  # its consumer is gone
                request.aborted = True


def _step_chunk(chunk: ScheduledChunk, decoding: bool) -> StepChunk:
    request = chunk.request
    ranges = (
        () if decoding else tuple(pair for _, pair in clip(request.prompt.embedding_ranges, chunk.start, chunk.stop))
    )
    return StepChunk(request.number, chunk.start, chunk.stop, decoding, request.cached, ranges)


# All loops are stopped at exit: a thread that still computes while the interpreter shuts down would crash the process.
_LOOPS: WeakSet[Loop] = WeakSet()


@atexit.register
def _stop_all() -> None:
    for loop in list(_LOOPS):
        if loop._process_id == os.getpid():  # a forked child has the objects, but not the threads that hold their locks
            loop.stop()
