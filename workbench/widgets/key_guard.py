"""An invisible widget that keeps Jupyter's shortcuts, such as `d d`, which deletes the cell, away from the controls beside it."""

from __future__ import annotations

import anywidget

from .view import source


class KeyGuard(anywidget.AnyWidget):
    """Guards all controls inside the nearest element of class "workbench-view", ipywidgets' own too, and names those without a name."""

    _esm = source("shared.js", "key_guard.js")
