"""The parts both benches are made of."""

from __future__ import annotations

from html import escape

import ipywidgets as w

WIDTH = "1100px"
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
    colours = {"good": ("#0b6e4f", "#e3f4ec"), "plain": ("#444444", "#f1f1ee"), "bad": ("#9b1d2f", "#fbe6e8")}
    ink, paper = colours[kind]
    return (
        f'<div role="status" style="color:{ink};background:{paper};border-left:4px solid {ink};padding:6px 10px;'
        f'line-height:1.45;max-width:{WIDTH}">{message}</div>'
    )


def table(header: list[str], rows: list[list[str]], summary: str) -> str:
    """A small HTML table, folded away: the picture above it in text."""
    head = "".join(f"<th style='text-align:left;padding:1px 10px'>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td style='padding:1px 10px'>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<details><summary>{escape(summary)}</summary><table><tr>{head}</tr>{body}</table></details>"
