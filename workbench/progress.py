"""How far a long run has come, told while it runs; what is told may raise, which stops the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1, after each part of the work."""


class Stopped(Exception):
    """A run was stopped because nobody waits for it any more."""


def part(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """The progress of a piece of the work, which lies between two shares of the whole."""
    if progress is None:
        return None
    whole = progress
    return lambda share: whole(begin + (end - begin) * share)


def counted(keep: Callable[[str, Any], object], progress: Progress | None, count: int) -> Callable[[str, Any], object]:
    """`keep(name, value)`, which tells after each call which share of `count` names has come."""
    if progress is None:
        return keep
    told, given = progress, set()

    def keep_and_tell(name: str, value: Any) -> None:
        keep(name, value)
        given.add(name)
        told(len(given) / count)

    return keep_and_tell
