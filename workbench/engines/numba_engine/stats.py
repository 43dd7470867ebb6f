"""What the engine is doing and has done: numbers for a live view, and a record of steps for a picture of the schedule."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine. Counts run from its start.

    Attributes:
        waiting, running: requests.
        pages, pages_used, pages_known: of the KV cache: all, held by requests, and of known content (used or not).
        page_size: tokens a page holds.
        prefix_hits, prefix_misses: prompt tokens found in the cache, and not found; hits are tokens that were not computed again.
        evictions: pages of known content given up for room; preemptions: requests that gave way.
        prompt_tokens, new_tokens: computed in prefills and decode steps.
        tokens_per_second: new tokens over the last seconds of work.
        steps, step_seconds, model_seconds: how many, how long in all, and how long of that in the model.
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
        """Share of the steps' time that was not spent in the model: scheduling, sampling, handing out."""
        return 1.0 - self.model_seconds / self.step_seconds if self.step_seconds else 0.0


@dataclass(frozen=True)
class StepPiece:
    """Tokens `[start, stop)` of one request in one step.

    Attributes:
        request: its number, in the order of arrival.
        cached: tokens of its prompt that came from the prefix cache.
        ranges: the parts of its ranges inside this piece.
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

    pieces: tuple[StepPiece, ...]
    began: float
    seconds: float
    model_seconds: float
    pages_used: int


class Counters:
    """Sums over steps, and the last `kept` of them."""

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
        for piece in step.pieces:
            if piece.decoding:
                self.new_tokens += len(piece)
            else:
                self.prompt_tokens += len(piece)

    def rate(self, seconds: float = 2.0) -> float:
        """New tokens a second of work, over the last `seconds` of it."""
        tokens, worked = 0, 0.0
        for step in reversed(self.history):
            tokens += sum(len(piece) for piece in step.pieces if piece.decoding)
            worked += step.seconds
            if worked >= seconds:
                break
        return tokens / worked if worked else 0.0
