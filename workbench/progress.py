"""Progress callbacks for long runs. A callback may raise `Stopped`, which ends the run and propagates to its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[float], None]
"""Called with the completed fraction, 0 to 1, after each part of the work."""


class Stopped(Exception):
    """Raised by a progress callback to end a run whose result is no longer needed."""


def part(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """Return a callback for one part of a run: its 0 to 1 is reported to `progress` as `begin` to `end`.

    None stays None.
    """
    if progress is None:
        return None
    whole = progress
    return lambda share: whole(begin + (end - begin) * share)


def counted(keep: Callable[[str, Any], object], progress: Progress | None, count: int) -> Callable[[str, Any], object]:
    """Return `keep`, extended to report at each call the fraction of `count` names that have been kept."""
    if progress is None:
        return keep
    report, kept = progress, set()

    def keep_and_report(name: str, value: Any) -> None:
        keep(name, value)
        kept.add(name)
        report(len(kept) / count)

    return keep_and_report
