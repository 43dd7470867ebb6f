"""What every view drawn in the browser has: its files, a picture for where no browser runs, colours as bytes."""

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

_HERE = Path(__file__).parent


def source(*names: str) -> str:
    """JavaScript files of this folder, one after the other: a view's module without a build step."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)


@cache
def palette(name: str) -> bytes:
    """256 colours of a matplotlib palette, red, green, blue."""
    colours = colormaps[name](np.linspace(0.0, 1.0, 256))[:, :3]
    return (colours * 255).round().astype(np.uint8).tobytes()


class View(anywidget.AnyWidget):
    """A view in the browser, with a picture beside it for readers without one: saved pages, papers, tests."""

    def figure(self) -> Figure:
        """What the view shows now, as a matplotlib figure."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return _with_picture(data, self.still), metadata

    def still(self) -> Figure | None:
        """The picture that is stored beside the view in a notebook: `figure`, or a part of it where that would be large."""
        return self.figure()


class Composite:
    """Widgets laid out as one, `view`. Display the object itself: a notebook then holds its picture beside the widgets."""

    view: w.Box

    def figure(self) -> Figure:
        """What is shown now, as a matplotlib figure.

        Raises:
            RuntimeError: there is nothing to draw yet.
        """
        raise NotImplementedError

    def still(self) -> Figure | None:
        """The picture that is stored beside the widgets, or None where there is none."""
        try:
            return self.figure()
        except RuntimeError:
            return None

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return _with_picture(data, self.still), metadata


def _with_picture(data: dict[str, Any], still: Callable[[], Figure | None]) -> dict[str, Any]:
    """A mime bundle that holds the figure too: shown where the widget cannot be."""
    try:
        figure = still()
        return data if figure is None else {**data, "image/png": base64.b64encode(to_png(figure)).decode()}
    except Exception as error:  # the widgets must not be kept from being shown
        warnings.warn(f"no picture is stored beside this view: {type(error).__name__}: {error}", stacklevel=2)
        return data
