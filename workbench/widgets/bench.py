"""What every bench has: one worker that draws the newest state, a line of status, and errors shown there."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import ipywidgets as w

from . import parts
from .latest import Latest


class Bench:
    """Controls and what they show. Subclasses build `view`, and redraw in `_draw`, which may stop at any `yield`."""

    view: w.VBox

    def __init__(self) -> None:
        self.status = w.HTML()
        self._jobs = Latest(self._show_error)

    def wait(self, timeout: float | None = 300.0) -> bool:
        """Wait until everything is drawn; False where that took longer than `timeout` seconds."""
        return self._jobs.wait(timeout)

    def _draw(self) -> Iterator[None]:
        raise NotImplementedError

    def _observe(self, *controls: w.Widget) -> None:
        """Redraw whenever one of these changes."""
        for control in controls:
            control.observe(self._changed, "value")

    def _changed(self, change: object = None) -> None:
        self._jobs.submit(self._draw)

    def _show_error(self, error: Exception) -> None:
        self.status.value = parts.note("bad", f"{type(error).__name__}: {escape(str(error))}")
