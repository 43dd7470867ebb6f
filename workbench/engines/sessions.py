"""Session ids of running requests: one request per id, and cancellation by id."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from .cancellation import Cancellation
from .types import EngineOutput, ResponseType


class Sessions:
    """The requests of one engine that have a session id: at most one runs per id, and any thread can cancel it."""

    def __init__(self) -> None:
        self._running: dict[int, Cancellation] = {}
        # Accepted requests whose stream has not started. Weak, so that a stream that is dropped before it starts leaves no entry.
        self._accepted: WeakValueDictionary[int, Cancellation] = WeakValueDictionary()
        self._lock = threading.Lock()

    def accept(self, session_id: int | None) -> Cancellation:
        """Register a new request, so that it can be cancelled by its id; return its cancellation token."""
        cancelled = Cancellation()
        if session_id is not None:
            with self._lock:
                self._accepted[session_id] = cancelled
        return cancelled

    def cancel(self, session_id: int) -> bool:
        """Cancel a request; return whether the request existed."""
        with self._lock:
            cancelled = self._running.get(session_id) or self._accepted.get(session_id)
        if cancelled is not None:
            cancelled.set()
        return cancelled is not None

    def stream(
        self, session_id: int | None, cancelled: Cancellation, steps: Generator[EngineOutput, None, None]
    ) -> Generator[EngineOutput, None, None]:
        """Yield the outputs of `steps`, and a last output with status CANCEL if the request is cancelled; close `steps` at the end.

        If another request is running under the id, yield only an output with status SESSION_REPEAT.
        """
        with self._reserve(session_id, cancelled) as free:
            if not free:
                yield EngineOutput(ResponseType.SESSION_REPEAT)
                return
            num_generated = 0
            try:
                while not cancelled.is_set():
                    output = next(steps, None)
                    if output is None or cancelled.is_set():
                        break
                    num_generated = output.num_token
                    yield output
                    if output.status is not ResponseType.SUCCESS:
                        return
            finally:
                steps.close()
            if cancelled.is_set():
                yield EngineOutput(ResponseType.CANCEL, num_token=num_generated)

    async def stream_async(
        self, session_id: int | None, cancelled: Cancellation, steps: AsyncGenerator[EngineOutput, None]
    ) -> AsyncGenerator[EngineOutput, None]:
        """Async version of `stream`."""
        with self._reserve(session_id, cancelled) as free:
            if not free:
                yield EngineOutput(ResponseType.SESSION_REPEAT)
                return
            num_generated = 0
            try:
                if not cancelled.is_set():
                    async for output in steps:
                        if cancelled.is_set():
                            break
                        num_generated = output.num_token
                        yield output
                        if output.status is not ResponseType.SUCCESS:
                            return
                        if cancelled.is_set():
                            break
            finally:
                await steps.aclose()
            if cancelled.is_set():
                yield EngineOutput(ResponseType.CANCEL, num_token=num_generated)

    @contextmanager
    def _reserve(self, session_id: int | None, cancelled: Cancellation) -> Iterator[bool]:
        """Reserve an id while a request runs; yield False if another request uses it."""
        free = session_id is None or self._enter(session_id, cancelled)
        try:
            yield free
        finally:
            if free and session_id is not None:
                with self._lock:
                    self._running.pop(session_id, None)

    def _enter(self, session_id: int, cancelled: Cancellation) -> bool:
        with self._lock:
            if self._accepted.get(session_id) is cancelled:
                del self._accepted[session_id]
            if session_id in self._running:
                return False
            self._running[session_id] = cancelled
            return True
