"""Run only the newest of many jobs: a slider asks for more pictures than can be drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..progress import Stopped

Job = Callable[[], Iterator[None]]


class Latest:
    """One worker thread that drops a job as soon as a newer one is asked for.

    A job is a generator; it may be dropped at each `yield`, and may raise `Stopped` between. `failed(error)` is called with what it raises, so that an error
    shows in the view and not in a log.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._change = threading.Condition()
        self._wanted: Job | None = None
        self._busy = False
        self._worker: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Run `job` next, instead of whatever runs or waits."""
        with self._change:
            if self._closed:
                return
            self._wanted = job
            self._busy = True
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="workbench-latest", daemon=True)
                self._worker.start()
            self._change.notify_all()

    def close(self) -> None:
        """Drop what runs and waits; later jobs are not taken."""
        with self._change:
            self._closed, self._busy = True, False
            self._wanted = lambda: iter(())  # makes what runs stop at its next yield
            self._change.notify_all()

    @property
    def newer(self) -> bool:
        """Whether a newer job waits: what runs now may stop."""
        return self._wanted is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; returns False when `timeout` seconds passed first."""
        with self._change:
            return self._change.wait_for(lambda: not self._busy, timeout)

    def pause(self, seconds: float) -> None:
        """For a job: wait, but no longer than until a newer job is asked for."""
        with self._change:
            self._change.wait_for(lambda: self._wanted is not None, seconds)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted is not None)
                if self._closed:
                    return
                job, self._wanted = self._wanted, None
            assert job is not None
            try:
                for _ in job():
                    if self._wanted is not None:
                        break
            except Stopped:  # for the newer one
                pass
            except Exception as error:  # whatever it is, the person at the slider must see it
                self._failed(error)
            with self._change:
                if self._wanted is None:
                    self._busy = False
                    self._change.notify_all()
