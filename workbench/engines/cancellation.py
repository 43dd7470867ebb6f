"""Whether a request was cancelled, told from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancellation:
    """Whether a request was cancelled, and whom to tell at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._told: list[Callable[[], object]] = []

    def tell(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the request is cancelled, from the thread that cancels; at once where it is already."""
        self._told.append(callback)
        if self._event.is_set():
            callback()

    def set(self) -> None:
        """Cancel the request."""
        self._event.set()
        for callback in list(self._told):
            callback()

    def is_set(self) -> bool:
        """Whether it was cancelled."""
        return self._event.is_set()
