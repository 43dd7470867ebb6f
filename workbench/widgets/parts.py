"""The parts that benches are made of."""

from __future__ import annotations

from html import escape

import ipywidgets as w

WIDTH = "1100px"
INK, QUIET = "var(--jp-ui-font-color1, #222)", "var(--jp-ui-font-color2, #5f5f5f)"
_WIDE = {"description_width": "initial"}


def text(description: str, value: str, width: str = "auto") -> w.Text:
    """A text box that reports when it is left or Enter is pressed."""
    return w.Text(value=value, description=description, continuous_update=False, style=_WIDE, layout={"width": width})


def slider(description: str, value: int, least: int, most: int, tooltip: str) -> w.HBox:
    """A slider for the mouse and a number box for the keyboard, linked in the browser; `.children[0]` is the slider."""
    bar = w.IntSlider(
        value=value, min=least, max=most, description=description, continuous_update=False, readout=False, style=_WIDE,
        tooltip=tooltip, layout={"width": "300px"},
    )  # fmt: skip
    box = w.BoundedIntText(value=value, min=least, max=most, layout={"width": "64px"}, tooltip=tooltip)
    for name in ("value", "min", "max"):
        w.jslink((bar, name), (box, name))
    return w.HBox([bar, box])


def picture() -> w.Image:
    """An image of fixed width, so that the page does not jump when it is redrawn. (A tooltip on an empty ipywidgets Image
    breaks its view; the text beside each picture says what it shows.)"""
    return w.Image(format="png", layout={"width": WIDTH, "max_width": "100%"})


def note(kind: str, message: str) -> str:
    """A coloured line. Kinds: good, plain, bad."""
    colour = {"good": "#17936a", "plain": "#888888", "bad": "#d1495b"}[kind]
    return (
        f'<div role="status" style="color:{INK};background:{tint(colour)};border-left:4px solid {colour};padding:6px 10px;'
        f'line-height:1.45;max-width:{WIDTH}">{message}</div>'
    )


def tint(colour: str) -> str:
    """A colour's trace on the paper of the page's theme."""
    return f"color-mix(in srgb, {colour} 14%, var(--jp-layout-color0, #fff))"


def table(header: list[str], rows: list[list[str]], summary: str) -> str:
    """A small HTML table, folded away: the picture above it in text."""
    head = "".join(f"<th style='text-align:left;padding:1px 10px'>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td style='padding:1px 10px'>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<details><summary>{escape(summary)}</summary><table><tr>{head}</tr>{body}</table></details>"
