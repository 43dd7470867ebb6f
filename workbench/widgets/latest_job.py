"""Run only the newest of many jobs in a worker thread: a dragged slider requests more than can be drawn."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from weakref import WeakSet

from ..progress import Stopped

Job = Callable[[], Iterator[None]]
"""A function that returns a generator, which does the work in parts and yields between them."""


_EXIT_SECONDS = 30.0
_alive: WeakSet[LatestJob] = WeakSet()


@atexit.register
def _end_all() -> None:
    """End the worker threads before the interpreter ends: one that still runs native code then would abort the process."""
    for job in list(_alive):
        job.close()
    for job in list(_alive):
        if job._worker is not None:
            job._worker.join(_EXIT_SECONDS)


class LatestJob:
    """A daemon thread that runs one job at a time and abandons it at its next `yield` once a newer one is submitted.

    `submit`, `wait` and `close` may be called from any thread. A job that yields rarely can raise `Stopped` when
    `newer` is true. Any other exception is passed to `failed`, in the worker thread.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._change = threading.Condition()
        self._wanted: Job | None = None
        self._busy = False
        self._worker: threading.Thread | None = None
        self._closed = False
        _alive.add(self)

    def submit(self, job: Job) -> None:
        """Run `job` next, instead of the waiting job, and abandon the running one at its next `yield`."""
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
        """Abandon the running job at its next `yield`, drop the waiting one, and ignore later ones; does not wait."""
        with self._change:
            self._closed, self._busy = True, False
            self._wanted = lambda: iter(())  # makes the running job stop at its next yield
            self._change.notify_all()

    @property
    def newer(self) -> bool:
        """Whether a newer job is waiting, so that the running one may stop."""
        return self._wanted is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no job is running or waiting; returns False if `timeout` seconds pass first."""
        with self._change:
            return self._change.wait_for(lambda: not self._busy, timeout)

    def pause(self, seconds: float) -> None:
        """Sleep for `seconds`, or until a newer job is submitted; for use inside a job."""
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
            except Stopped:  # a newer job is waiting
                pass
            except Exception as error:  # any error must be shown to the user
                try:
                    self._failed(error)
                except Exception:  # the thread must live, or the next change would wait for ever
                    logging.getLogger(__name__).exception("an error could not be shown")
            with self._change:
                if self._wanted is None:
                    self._busy = False
                    self._change.notify_all()
