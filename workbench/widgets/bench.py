"""What every bench has: one worker that draws the newest state, a line of status, and errors shown there."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import ipywidgets as w
from matplotlib.figure import Figure

from ..progress import Progress, Stopped
from . import parts
from .latest import Latest
from .view import Composite

_FIRST_PICTURE = 5.0
"""Seconds that a cell waits for the picture to store, its widgets too; they come without one where it takes longer."""


class Bench(Composite):
    """Controls and what they show. Subclasses build `view`, and redraw in `_draw`, which may stop at any `yield`; `progress` and
    `doing` are for the views of those that compute for seconds.
    """

    def __init__(self) -> None:
        self.status = w.HTML()
        self.progress = w.FloatProgress(min=0.0, max=1.0, layout={"width": "160px", "visibility": "hidden"})
        self.doing = w.HTML()
        self._jobs = Latest(self._show_error)

    def wait(self, timeout: float | None = 300.0) -> bool:
        """Wait until everything is drawn; False where that took longer than `timeout` seconds."""
        return self._jobs.wait(timeout)

    def still(self) -> Figure | None:
        return super().still() if self.wait(_FIRST_PICTURE) else None

    def _draw(self) -> Iterator[None]:
        raise NotImplementedError

    def _observe(self, *controls: w.Widget) -> None:
        """Redraw whenever one of these changes."""
        for control in controls:
            control.observe(self._changed, "value")

    def _changed(self, change: object = None) -> None:
        self._jobs.submit(self._draw)

    def _progress(self, name: str) -> Progress:
        """For a long piece of a job: shows how far it is, and stops it where a newer job waits."""

        def told(share: float) -> None:
            if self._jobs.newer:
                raise Stopped(name)
            self._told(name, share)

        return told

    def _told(self, name: str, share: float) -> None:
        self.progress.layout.visibility = "visible"
        self.progress.value = min(share, 1.0)
        if self.doing.value != name:
            self.doing.value = name

    def _quiet(self) -> None:
        self.progress.layout.visibility = "hidden"
        self.doing.value = ""

    def _show_error(self, error: Exception) -> None:
        self._quiet()
        self.status.value = parts.note("bad", f"{type(error).__name__}: {escape(str(error))}")
