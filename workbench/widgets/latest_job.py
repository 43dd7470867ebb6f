"""Run only the newest of many jobs, because a slider requests more figures than can be drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from ..progress import Stopped

Job = Callable[[], Iterator[None]]


class LatestJob:
    """A worker thread that drops a job as soon as a newer one is submitted.

    A job is a function that returns a generator; it may be dropped at each `yield`, and may raise `Stopped` in between. Any other
    exception is passed to `failed`, so that it is shown in the view and not in a log.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._change = threading.Condition()
        self._wanted: Job | None = None
        self._busy = False
        self._worker: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Run `job` next, in place of the running and the waiting job."""
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
        """Drop the running and the waiting job; later jobs are ignored."""
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
        """Called by a job: wait `seconds`, or until a newer job is submitted."""
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
                self._failed(error)
            with self._change:
                if self._wanted is None:
                    self._busy = False
                    self._change.notify_all()
