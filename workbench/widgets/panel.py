"""The base class of panels: a worker thread redraws after each change; errors are shown in a status line."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import ipywidgets as w

from ..plots.figure import Figure
from ..progress import Progress, Stopped
from . import components
from .latest_job import LatestJob
from .view import Composite, close_widgets, snapshot_seconds


class Panel(Composite):
    """Controls, and views that are redrawn in a worker thread whenever a control changes.

    A subclass builds the widget `view` and implements the generator `_draw`, which redraws everything; it is abandoned
    at its next `yield` if something has changed again.

    Attributes:
        status: a line for messages and errors.
        progress, doing: a progress bar and its label, for computations that take seconds.
    """

    def __init__(self) -> None:
        self.status = w.HTML()
        self.progress = w.FloatProgress(min=0.0, max=1.0, layout={"width": "160px", "visibility": "hidden"})
        self.doing = w.HTML()
        self._jobs = LatestJob(self._show_error)

    def wait(self, timeout: float | None = 300.0) -> bool:
        """Wait until everything is drawn; return False if that takes longer than `timeout` seconds."""
        return self._jobs.wait(timeout)

    def snapshot(self) -> Figure | None:
        return super().snapshot() if self.wait(snapshot_seconds()) else None

    def close(self) -> None:
        """Stop running work, remove the view from the page and free its widgets."""
        self._jobs.close()
        close_widgets(self.status, self.progress, self.doing)  # a view need not contain them
        super().close()

    def _draw(self) -> Iterator[None]:
        raise NotImplementedError

    def _observe(self, *controls: w.Widget) -> None:
        """Redraw whenever the value of one of these widgets changes."""
        for control in controls:
            control.observe(self._changed, "value")

    def _changed(self, change: object = None) -> None:
        self._jobs.submit(self._draw)

    def _progress(self, name: str) -> Progress:
        """Return a progress callback for a long part of a job; it raises `Stopped` if a newer job is waiting."""

        def report(share: float) -> None:
            if self._jobs.newer:
                raise Stopped(name)
            self._show_progress(name, share)

        return report

    def _show_progress(self, name: str, share: float) -> None:
        self.progress.layout.visibility = "visible"
        self.progress.value = min(share, 1.0)
        if self.doing.value != name:
            self.doing.value = name

    def _hide_progress(self) -> None:
        self.progress.layout.visibility = "hidden"
        self.doing.value = ""

    def _show_error(self, error: Exception) -> None:
        self._hide_progress()
        self.status.value = components.note("bad", f"{type(error).__name__}: {escape(str(error))}")
