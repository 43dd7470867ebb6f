"""Measure the peak memory of a block of code."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Resident memory of this process while a `with` block runs, sampled every 2 ms.

    Attributes:
        bytes: the peak minus the memory that the process used when the block began.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def in_words(count: float) -> str:
    """Format a number of bytes for people: `1.5 MB`, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
