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
        prefix_hits, prefix_misses: prompt tokens found in the cache, and not found; hits are tokens that were not computed again.
        evictions: pages of known content evicted to make space; preemptions: how often a request was preempted.
        prompt_tokens, new_tokens: tokens computed in prefills and in decode steps.
        tokens_per_second: new tokens per second, over the last seconds of work.
        steps, step_seconds, model_seconds: number of steps, their total time, and the part of it spent in the model.
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
        request: its number, in the order of arrival.
        cached: tokens of its prompt that came from the prefix cache.
        ranges: its embedding ranges, clipped to this chunk.
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
    """One step: what ran, when it began (seconds since the engine's start) and how long it took."""

    chunks: tuple[StepChunk, ...]
    began: float
    seconds: float
    model_seconds: float
    pages_used: int


class Counters:
    """Totals over all steps, and the last `kept` steps."""

    def __init__(self, kept: int = 4096) -> None:
        self.started = time.perf_counter()
        self.history: deque[Step] = deque(maxlen=kept)
        self.steps = self.prompt_tokens = self.new_tokens = self.finished = 0
        self.step_seconds = self.model_seconds = 0.0

    def add(self, step: Step) -> None:
        """Count a step."""
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
        """New tokens per second of work, over the last `seconds` of work."""
        tokens, worked = 0, 0.0
        for step in reversed(self.history):
            tokens += sum(len(chunk) for chunk in step.chunks if chunk.decoding)
            worked += step.seconds
            if worked >= seconds:
                break
        return tokens / worked if worked else 0.0
