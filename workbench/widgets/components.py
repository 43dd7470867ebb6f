"""Small widgets and HTML snippets that the panels share."""

from __future__ import annotations

import base64
from html import escape

import ipywidgets as w

from ..plots.figure import Figure
from ..plots.png import to_png

WIDTH = "1100px"
INK, QUIET = "var(--jp-ui-font-color1, #222)", "var(--jp-ui-font-color2, #5f5f5f)"
_WIDE = {"description_width": "initial"}


def text(description: str, value: str, width: str = "auto") -> w.Text:
    """A text box whose value changes when Enter is pressed or it loses focus."""
    return w.Text(value=value, description=description, continuous_update=False, style=_WIDE, layout={"width": width})


def slider(description: str, value: int, least: int, most: int, tooltip: str) -> w.HBox:
    """A slider from `least` to `most` and a number box, linked in the browser; `.children[0]` is the slider."""
    bar = w.IntSlider(
        value=value, min=least, max=most, description=description, continuous_update=False, readout=False, style=_WIDE,
        tooltip=tooltip, layout={"width": "300px"},
    )  # fmt: skip
    box = w.BoundedIntText(value=value, min=least, max=most, layout={"width": "64px"}, tooltip=tooltip)
    both = w.HBox([bar, box])
    both.links = [w.jslink((bar, name), (box, name)) for name in ("value", "min", "max")]
    return both


class FigureImage(w.HTML):
    """A figure as an image of fixed width, with a text for screen readers; empty until `show`. It follows a dark theme."""

    def show(self, figure: Figure, text: str) -> None:
        """Show a figure; `text` says what it shows."""
        data = base64.b64encode(to_png(figure)).decode()
        self.value = (
            f'<img class="workbench-figure" alt="{escape(text)}" style="width:{WIDTH};max-width:100%" src="data:image/png;base64,{data}">'
            f"<style>{_DARK}</style>"
        )


_DARK = "body[data-jp-theme-light='false'] .workbench-figure { filter: invert(0.9) hue-rotate(180deg); }"
"""White paper is dark in a dark theme; turning the hues back keeps colours recognisable."""


def note(kind: str, message: str) -> str:
    """Return a message as HTML, with a coloured edge for its `kind`: good, plain or bad.

    `message` is HTML and is not escaped.
    """
    colour = {"good": "#17936a", "plain": "#888888", "bad": "#d1495b"}[kind]
    return (
        f'<div role="status" style="color:{INK};background:{tint(colour)};border-left:4px solid {colour};padding:6px 10px;'
        f'line-height:1.45;max-width:{WIDTH}">{message}</div>'
    )


def tint(colour: str) -> str:
    """Return a CSS colour: a faint tint of `colour` over the background of JupyterLab's theme."""
    return f"color-mix(in srgb, {colour} 14%, var(--jp-layout-color0, #fff))"
