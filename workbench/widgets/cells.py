"""Views by the notebook cell that made them: running a cell again closes the views of its earlier run, and frees their memory."""

from __future__ import annotations

import sys
import weakref
from typing import Any, Protocol


class Closable(Protocol):
    def close(self) -> None: ...


_views: dict[str, tuple[str, list[weakref.ref]]] = {}
"""By cell: the run of the cell, and the views that it made."""


def close_views_of_earlier_runs() -> None:
    """Close the views that earlier runs of the running cell made. Outside notebooks, and where cells have no names, it does nothing."""
    found = _running()
    if found is None:
        return
    cell, run = found
    before, views = _views.get(cell, (run, []))
    if before == run:
        return
    del _views[cell]
    for reference in views:
        view = reference()
        if view is not None:
            view.close()


def remember_view(view: Closable) -> None:
    """Note that the running cell made a view."""
    found = _running()
    if found is None:
        return
    cell, run = found
    _views.setdefault(cell, (run, []))[1].append(weakref.ref(view))


def _running() -> tuple[str, str] | None:
    """The name of the running cell, which JupyterLab and others send with it, and of its run; None if there is none."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "get_parent"):
        return None
    message = shell.get_parent() or {}
    cell = message.get("metadata", {}).get("cellId")
    run = message.get("header", {}).get("msg_id")
    return (cell, run) if isinstance(cell, str) and isinstance(run, str) else None
