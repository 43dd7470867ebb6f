"""The peak of this process's memory while a block runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class PeakMemory:
    """The peak of the process's anonymous memory, in `bytes`, sampled every millisecond."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._ended = anonymous_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, anonymous_memory())
            time.sleep(0.001)


def anonymous_memory() -> int:
    """Bytes of anonymous memory of this process, that is, without mapped files (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
