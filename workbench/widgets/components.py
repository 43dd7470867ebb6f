"""Small widgets and HTML snippets that the panels share."""

from __future__ import annotations

import ipywidgets as w

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


def figure_image() -> w.Image:
    """An empty PNG image of fixed width, so that the page does not jump when it is redrawn.

    It has no tooltip, because a tooltip on an empty ipywidgets Image breaks its view; the text next to each image
    describes it.
    """
    return w.Image(format="png", layout={"width": WIDTH, "max_width": "100%"})


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
