"""The engine's thread: runs steps while there are requests, and ends when there are none."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence as Several
from typing import Any
from weakref import WeakSet

import torch
from range_kernels import KVPages

from ...errors import ModelError
from ...ranges import clip
from .batch import Batch
from .decoder import Decoder
from .scheduler import Piece, Scheduler
from .sequence import Sequence
from .stats import Counters, EngineStats, Step, StepPiece

_MOST_PINNED = 64 << 20  # bytes


class Loop:
    """Takes requests from any thread and delivers each one's outputs as they come.

    A step whose forward pass fails is run again, request by request, so that only the request at fault ends.
    """

    def __init__(self, decoder: Decoder, pages: KVPages, scheduler: Scheduler) -> None:
        self.decoder, self.pages, self.scheduler = decoder, pages, scheduler
        self.counters = Counters()
        self._lock = threading.Lock()  # holds for the scheduler and the thread's coming and going, never during a step
        self._step_lock = threading.Lock()  # one step at a time; taken before the other lock
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._numbers = 0
        _LOOPS.add(self)

    def submit(self, sequence: Sequence, alone: bool = False) -> None:
        """Queue a request.

        Args:
            alone: its consumer will call `step_alone` while it waits; no thread is needed as long as there is no other request.
        """
        with self._lock:
            sequence.number = self._numbers
            self._numbers += 1
            crowded = bool(self.scheduler.running or self.scheduler.waiting)
            self.scheduler.add(sequence)
            if self._thread is None and (crowded or not alone):
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="workbench-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step, for good."""
        self._stopping = True
        thread = self._thread
        if thread is not None:
            thread.join()

    def step_alone(self) -> bool:
        """Run a step in the calling thread; False where the engine's own thread runs them.

        Two threads that compute in turns cost each other their pools of workers: one request is faster without the second.
        """
        with self._step_lock:
            with self._lock:
                if self._thread is not None:
                    return False
            return self._one_step()

    def abort(self, sequence: Sequence) -> None:
        """Drop a request: at once where no step is running, else before the next one; its pages are free then."""
        sequence.aborted = True
        if self._step_lock.acquire(blocking=False):
            try:
                with self._lock:
                    self.scheduler.finish(sequence)
            finally:
                self._step_lock.release()

    def stats(self) -> EngineStats:
        """The engine as it is now."""
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
        """Schedule and run; False where there was nothing to do. Then the thread, if one called, has ended."""
        began = time.perf_counter()
        pieces: list[Piece] = []
        try:
            with self._lock:
                pieces = self.scheduler.schedule()
                if not pieces:
                    self._thread = None
                    return False
            self._step(pieces, began)
        except BaseException as error:  # a fault of the engine's own: nobody may wait for ever
            scheduler = self.scheduler
            self._fail([piece.sequence for piece in pieces] or [*scheduler.running, *scheduler.waiting], error)
            if isinstance(error, KeyboardInterrupt):  # in the caller's own thread
                raise
        return True

    def _step(self, pieces: list[Piece], began: float) -> None:
        decoding = [piece.sequence.decoding for piece in pieces]
        before = time.perf_counter()
        try:
            results: list[Any] = list(self._forward(pieces))
        except Exception:
            results = [self._forward_alone(piece) for piece in pieces]
        model_seconds = time.perf_counter() - before
        used = self.scheduler.blocks.used
        for piece, result in zip(pieces, results, strict=True):
            if isinstance(result, Exception):
                self._fail([piece.sequence], result)
            else:
                self._take(piece, *result)
        shown = tuple(_shown(piece, decodes) for piece, decodes in zip(pieces, decoding, strict=True))
        now = time.perf_counter()
        self.counters.add(Step(shown, began - self.counters.started, now - began, model_seconds, used))

    def _forward(self, pieces: Several[Piece]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and hidden states of each piece, of the rows that are needed."""
        batch = Batch.of(
            [(piece.sequence, piece.start, piece.stop) for piece in pieces],
            self.decoder.table,
            self.pages.page_size,
            bool(self.decoder.backbone.mrope),
        )
        hidden = self.decoder.forward(batch, self.pages)
        kept = []
        for piece, end in zip(pieces, batch.cu_queries[1:].tolist(), strict=True):
            rows = piece.stop - piece.start
            kept.append(slice(end - rows, end) if piece.sequence.wants_prompt_states else slice(end - 1, end))
        needed = torch.cat([hidden[rows] for rows in kept])
        logits = self.decoder.logits(needed)
        sizes = [rows.stop - rows.start for rows in kept]
        if self.decoder.device.type == "cuda":
            logits = logits.float()
            # One copy for all requests. A prompt's states are kept until its last chunk, too long for pinned memory.
            lasting = any(piece.sequence.wants_prompt_states for piece in pieces)
            logits = logits.cpu() if lasting else _on_host(logits)
        return list(zip(logits.split(sizes), needed.split(sizes), strict=True))

    def _forward_alone(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor] | Exception:
        try:
            return self._forward([piece])[0]
        except Exception as error:
            return error

    def _take(self, piece: Piece, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Count a piece as done; where it ends what is known of its request, choose the next token."""
        sequence = piece.sequence
        with self._lock:
            self.scheduler.advance(piece)
        if sequence.wants_prompt_states:
            sequence.states.append((logits, hidden))
        answer = sequence.answer
        if not piece.last or sequence.aborted or answer is None:
            return
        if sequence.states:
            logits, hidden = (torch.cat(parts) for parts in zip(*sequence.states, strict=True))
            sequence.states.clear()
        try:
            output = answer.take(logits, hidden)
            if answer.finished:
                with self._lock:
                    self.scheduler.finish(sequence)
                    self.counters.finished += 1
            else:
                sequence.say(answer.token)
            sequence.deliver(output)
        except Exception as error:
            self._fail([sequence], error)

    def _fail(self, sequences: Several[Sequence], error: BaseException) -> None:
        """End requests with an error."""
        if not isinstance(error, ModelError):
            wrapped = ModelError(f"the numba engine failed in this request: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        for sequence in sequences:
            with self._lock:
                self.scheduler.finish(sequence)
            try:
                sequence.deliver(error)
            except Exception:  # its consumer is gone
                sequence.aborted = True


def _on_host(x: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, into memory that the GPU writes to itself where that is not too much to take from the system."""
    if x.nbytes > _MOST_PINNED:
        return x.cpu()
    out = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)  # PyTorch keeps such memory, and gives it out again
    out.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return out


def _shown(piece: Piece, decoding: bool) -> StepPiece:
    sequence = piece.sequence
    ranges = (
        () if decoding else tuple(pair for _, pair in clip(sequence.prompt.embedding_ranges, piece.start, piece.stop))
    )
    return StepPiece(sequence.number, piece.start, piece.stop, decoding, sequence.cached, ranges)


# A thread that is computing while the interpreter is taken down brings the process down with it.
_LOOPS: WeakSet[Loop] = WeakSet()


@atexit.register
def _stop_all() -> None:
    for loop in list(_LOOPS):
        loop.stop()
