"""Engine statistics: numbers for a live view, and a record of steps for plotting the schedule."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine. Counts are totals since its start.

    Attributes:
        waiting, running: numbers of requests.
        pages, pages_used, pages_known: pages of the KV cache: all, in use by requests, of known content (used or not).
        page_size: tokens per page.
        prefix_hits, prefix_misses: prompt tokens found in the prefix cache (so not computed again), and not found.
        evictions: pages of known content evicted to make space; preemptions: how often a request was preempted.
        finished: requests that ended by a stop token or `max_new_tokens`.
        prompt_tokens, new_tokens: tokens computed in prefills and in decode steps.
        tokens_per_second: new tokens per second, over the last seconds of work.
        steps, step_seconds, model_seconds: number of steps (forward passes), their total time in seconds, and the part of it spent in
            the model.
    """

    waiting: int
    running: int
    pages: int
    pages_used: int
    pages_known: int
    page_size: int
    prefix_hits: int
    prefix_misses: int
    evictions: int
    preemptions: int
    finished: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    steps: int
    step_seconds: float
    model_seconds: float

    @property
    def overhead(self) -> float:
        """Fraction of the steps' time that was not spent in the model: scheduling, sampling, delivery."""
        return 1.0 - self.model_seconds / self.step_seconds if self.step_seconds else 0.0


@dataclass(frozen=True)
class StepChunk:
    """Tokens `[start, stop)` of one request in one step.

    Attributes:
        request: the request's number, in the order of arrival.
        decoding: whether this is the request's newest generated token (a decode step), not a part of a prefill.
        cached: number of the request's tokens that came from the prefix cache.
        ranges: the parts of the request's embedding ranges inside this chunk, in prompt positions; empty if `decoding`.
    """

    request: int
    start: int
    stop: int
    decoding: bool
    cached: int
    ranges: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Step:
    """One step (forward pass) of the engine.

    Attributes:
        began: seconds from the engine's start to the beginning of the step.
        seconds, model_seconds: duration of the step, and of the model's part of it.
        pages_used: KV pages in use by requests.
    """

    chunks: tuple[StepChunk, ...]
    began: float
    seconds: float
    model_seconds: float
    pages_used: int


class Counters:
    """Totals over all steps, and a history of the last `kept` steps."""

    def __init__(self, kept: int = 4096) -> None:
        self.started = time.perf_counter()
        self.history: deque[Step] = deque(maxlen=kept)
        self.steps = self.prompt_tokens = self.new_tokens = self.finished = 0
        self.step_seconds = self.model_seconds = 0.0

    def add(self, step: Step) -> None:
        """Add a step to totals and history."""
        self.history.append(step)
        self.steps += 1
        self.step_seconds += step.seconds
        self.model_seconds += step.model_seconds
        for chunk in step.chunks:
            if chunk.decoding:
                self.new_tokens += len(chunk)
            else:
                self.prompt_tokens += len(chunk)

    def rate(self, seconds: float = 2.0) -> float:
        """New tokens per second, over the last `seconds` that were spent in steps; time without requests does not count."""
        tokens, worked = 0, 0.0
        for step in reversed(tuple(self.history)):  # a copy: the engine's thread appends meanwhile
            tokens += sum(len(chunk) for chunk in step.chunks if chunk.decoding)
            worked += step.seconds
            if worked >= seconds:
                break
        return tokens / worked if worked else 0.0
