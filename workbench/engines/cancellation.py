"""A thread-safe cancellation token with callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancellation:
    """The cancellation token of one request."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._callbacks: list[Callable[[], object]] = []

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Call `callback` in the thread that cancels the request, or immediately if it is already cancelled."""
        self._callbacks.append(callback)
        if self._event.is_set():
            callback()

    def set(self) -> None:
        """Cancel the request."""
        self._event.set()
        for callback in list(self._callbacks):
            callback()

    def is_set(self) -> bool:
        """Whether the request was cancelled."""
        return self._event.is_set()
