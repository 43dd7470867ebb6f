"""Run several forward passes through a model together, layer by layer, so that the weights of each layer are read once for all.

Each pass runs in a thread of its own, as the class's forward is written. Only one thread runs at a time: it stops before each unit
of streamed weights, until all passes have come there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


class _Ended(BaseException):
    """Raised inside a waiting pass when another one failed, or the run was interrupted."""


class Lockstep:
    """Passes that wait for each other before each unit.

    Args:
        unit_done: called with a unit's name after all passes that need it have run through it.
    """

    def __init__(self, unit_done: Callable[[str], None]) -> None:
        self._unit_done = unit_done
        self._passes: list[_Pass] = []
        self._turn_over = threading.Semaphore(0)
        self._ended = False

    def run(self, passes: Sequence[Callable[[Callable[[str], None]], Any]]) -> list[Any]:
        """Run the passes, each in a thread of its own, and return their results in the order given.

        Before a unit, such as one layer's weights, all wait until every pass that needs it has asked for it; then they run one at a
        time, in the order given.

        Args:
            passes: each is called in its own thread with a function that it must call with a unit's name before it needs that unit.

        Raises:
            The exception of the first pass that fails; the others are stopped.
        """
        self._passes = [_Pass(self, work) for work in passes]
        try:
            for each in self._passes:
                self._turn(each)
            while waiting := [each for each in self._passes if each.unit is not None]:
                unit = waiting[0].unit
                assert unit is not None
                for each in waiting:
                    if each.unit == unit:
                        self._turn(each)
                self._unit_done(unit)
        finally:
            self._ended = True
            for each in self._passes:
                each.go.release()
            for each in self._passes:
                each.thread.join()
        return [each.result for each in self._passes]

    def _turn(self, each: _Pass) -> None:
        """Let a pass run until it waits for its next unit or ends."""
        each.go.release()
        self._turn_over.acquire()
        if each.error is not None:
            raise each.error


class _Pass:
    def __init__(self, lockstep: Lockstep, work: Callable[[Callable[[str], None]], Any]) -> None:
        self._lockstep, self._work = lockstep, work
        self.go = threading.Semaphore(0)
        self.unit: str | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._wait()
            self.result = self._work(self._arrive)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.unit = None
            self._lockstep._turn_over.release()

    def _arrive(self, unit: str) -> None:
        self.unit = unit
        self._lockstep._turn_over.release()
        self._wait()

    def _wait(self) -> None:
        self.go.acquire()
        if self._lockstep._ended:
            raise _Ended
