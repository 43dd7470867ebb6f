"""A thread-safe cancellation token with callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Cancellable(Protocol):
    """What says that work should end: a `threading.Event` or a `Cancellation`."""

    def is_set(self) -> bool: ...


class Cancellation:
    """The cancellation token of one request: any thread may set it; the engine polls it or registers callbacks."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._callbacks: list[Callable[[], object]] = []

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Call `callback()` when the request is cancelled, in the thread that calls `set`; if it already is, immediately in this one.

        It may be called more than once, so repeated calls must do no harm.
        """
        self._callbacks.append(callback)
        if self._event.is_set():
            callback()

    def set(self) -> None:
        """Cancel the request, then run all callbacks in this thread, in the order of registration.

        A second call runs them again. An exception in a callback is raised here, and the callbacks after it do not run.
        """
        self._event.set()
        for callback in list(self._callbacks):
            callback()

    def is_set(self) -> bool:
        """Whether the request was cancelled."""
        return self._event.is_set()
