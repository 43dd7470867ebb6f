"""Base classes of the views: their static files, an image for readers without a browser, palettes as bytes."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as w
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..plots.png import to_png

_STATIC = Path(__file__).parent / "static"


def source(*names: str) -> str:
    """The named files of `static/`, concatenated: a view's JavaScript module or style sheet without a build step."""
    return "\n".join((_STATIC / name).read_text(encoding="utf-8") for name in names)


@cache
def palette(name: str) -> bytes:
    """256 colours of a matplotlib colormap, as RGB bytes."""
    colours = colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3]
    return (colours * 255).round().astype(np.uint8).tobytes()


class View(anywidget.AnyWidget):
    """A view in the browser that also has a static image, for saved pages, papers and tests."""

    def figure(self) -> Figure:
        """What the view shows now, as a matplotlib figure."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return _with_png(data, self.snapshot), metadata

    def snapshot(self) -> Figure | None:
        """The figure that a notebook stores with the view: `figure`, or a part of it if that would be large."""
        return self.figure()


class Composite:
    """Several widgets laid out as one, `view`. Display the object itself, so that the notebook also stores a static image."""

    view: w.Box

    def figure(self) -> Figure:
        """What is shown now, as a matplotlib figure.

        Raises:
            RuntimeError: there is nothing to draw yet.
        """
        raise NotImplementedError

    def snapshot(self) -> Figure | None:
        """The figure that a notebook stores with the widgets, or None if there is none."""
        try:
            return self.figure()
        except RuntimeError:
            return None

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return _with_png(data, self.snapshot), metadata


def _with_png(data: dict[str, Any], snapshot: Callable[[], Figure | None]) -> dict[str, Any]:
    """Add the figure to a mime bundle, for readers that cannot show the widget."""
    try:
        figure = snapshot()
        return data if figure is None else {**data, "image/png": base64.b64encode(to_png(figure)).decode()}
    except Exception as error:  # the widgets must be shown even if the figure fails
        warnings.warn(f"no image is stored with this view: {type(error).__name__}: {error}", stacklevel=2)
        return data
