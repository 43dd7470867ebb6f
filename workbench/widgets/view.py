"""Base classes of the views, which also store a static image in the notebook, for programs that cannot show widgets.

`source` reads the JavaScript and CSS files of a view, `palette` makes the colours for it.
"""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as w
import numpy as np
from matplotlib import colormaps

from ..plots.figure import Figure
from ..plots.png import to_png

_STATIC = Path(__file__).parent / "static"


def source(*names: str) -> str:
    """Return files of `static/`, concatenated: a view's JavaScript module or style sheet, without a build step."""
    return "\n".join((_STATIC / name).read_text(encoding="utf-8") for name in names)


def snapshot_seconds(usual: float = 0.4) -> float:
    """How long displaying a view waits for its static image; after that, the notebook stores a simpler one, or none.

    A person waits for the view, so `usual` is short. Where a notebook is executed to be stored, `WORKBENCH_SNAPSHOT_SECONDS` can be longer.
    """
    try:
        return float(os.environ.get("WORKBENCH_SNAPSHOT_SECONDS", ""))
    except ValueError:
        return usual


@cache
def palette(name: str) -> bytes:
    """Return 256 colours of a matplotlib colormap as 768 bytes, RGB."""
    colours = colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3]
    return (colours * 255).round().astype(np.uint8).tobytes()


class View(anywidget.AnyWidget):
    """A widget with its own JavaScript that can also draw itself as a figure, for saved notebooks, papers and tests."""

    def figure(self) -> Figure:
        """Return what the view shows now as a matplotlib figure."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the view from the page and free it, its layout included."""
        layout = self.layout
        super().close()
        layout.close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return _with_png(data, self.snapshot), metadata

    def snapshot(self) -> Figure | None:
        """Return the figure that a notebook stores with the view: `figure`, or a part of it if that would be large."""
        return self.figure()


class Composite:
    """Several ipywidgets in one box, `view`.

    Display the object, not `view`, so that the notebook also stores a static image. `close` removes all of them.
    """

    view: w.Box

    def close(self) -> None:
        """Remove the view from the page and free its widgets."""
        close_widgets(self.view)

    def figure(self) -> Figure:
        """Return what is shown now as a matplotlib figure.

        Raises:
            RuntimeError: nothing has been drawn yet.
        """
        raise NotImplementedError

    def snapshot(self) -> Figure | None:
        """Return the figure that a notebook stores with the widgets, or None if nothing has been drawn yet."""
        try:
            return self.figure()
        except RuntimeError:
            return None

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return _with_png(data, self.snapshot), metadata


def close_widgets(*roots: w.Widget) -> None:
    """Close widgets with all that they contain: children, layouts, styles and links. ipywidgets closes none of these by itself."""
    closed: set[int] = set()

    def close(widget: w.Widget) -> None:
        if id(widget) in closed:
            return
        closed.add(id(widget))
        for name in ("children", "links"):
            for part in getattr(widget, name, ()):
                close(part)
        for name in ("layout", "style"):
            part = getattr(widget, name, None)
            if isinstance(part, w.Widget):
                close(part)
        widget.close()

    for root in roots:
        close(root)


def _with_png(data: dict[str, Any], snapshot: Callable[[], Figure | None]) -> dict[str, Any]:
    """Add the figure to a mime bundle, for readers that cannot show the widget."""
    try:
        figure = snapshot()
        return data if figure is None else {**data, "image/png": base64.b64encode(to_png(figure)).decode()}
    except Exception as error:  # the widgets must be shown even if the figure fails
        warnings.warn(f"no image is stored with this view: {type(error).__name__}: {error}", stacklevel=2)
        return data
