"""An invisible widget that keeps Jupyter's shortcuts away from the controls beside it, such as `d d`, which deletes the cell."""

from __future__ import annotations

import anywidget

from .view import source


class KeyGuard(anywidget.AnyWidget):
    """Guards all controls inside the nearest element of class "workbench-view", those of ipywidgets too."""

    _esm = source("shared.js", "key_guard.js")
