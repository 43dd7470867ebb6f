"""The token strip: a prompt's tokens as boxes, with ranges in colour."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .figure import Figure
from .style import INK, PAPER, QUIET, SPAN
from .visible_text import drawable, fonts, label, width

_LINE_LENGTH = 118  # characters per line


def _lines(tokens: Sequence[str]) -> list[list[tuple[int, str, int]]]:
    """Lay tokens out in lines: (position, label, first column) of each token."""
    lines: list[list[tuple[int, str, int]]] = []
    line: list[tuple[int, str, int]] = []
    at = 0
    for position, token in enumerate(tokens):
        text = label(token)
        if at + width(text) + 1 > _LINE_LENGTH:
            lines.append(line)
            line, at = [], 0
        line.append((position, text, at))
        at += width(text) + 1
    return [*lines, line]


def draw_token_strip(axes: Axes, tokens: Sequence[str]) -> None:
    """Draw tokens as boxes in reading order, with the position under the first of each line."""
    lines = _lines(tokens)
    for row, line in enumerate(lines):
        for position, text, at in line:
            _box(axes, row, at, text, PAPER, INK)
            if position == line[0][0]:
                axes.text(at + 0.1, row + 0.8, str(position), ha="left", va="center", fontsize=6, color=QUIET)
    axes.set_xlim(-0.3, _LINE_LENGTH + 1)
    axes.set_ylim(len(lines), -0.15)
    axes.axis("off")


def mark_strip(axes: Axes, tokens: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[Artist]:
    """Draw the boxes inside ranges again, in colour, with the position of each range's start; return what was drawn."""
    inside = {
        position
        for start, stop in ranges
        for position in range(max(start, 0), min(stop, len(tokens)))  # ranges may be invalid
    }
    starts = {start for start, _ in ranges}
    marks: list[Artist] = []
    for row, line in enumerate(_lines(tokens)):
        for position, text, at in line:
            if position in inside:
                marks += _box(axes, row, at, text, SPAN, "white")
            if position in starts:
                marks.append(
                    axes.text(at + 0.1, row + 0.8, str(position), ha="left", va="center", fontsize=6, color=SPAN)
                )
    return marks


def _box(axes: Axes, row: int, at: int, text: str, fill: str, ink: str) -> list[Artist]:
    size = width(text)
    box = Rectangle((at, row), size + 0.6, 0.62, facecolor=fill, edgecolor="#d8d8d4", linewidth=0.6)
    written = axes.text(
        at + size / 2 + 0.3,
        row + 0.32,
        drawable(text),
        ha="center",
        va="center",
        fontsize=7.5,
        color=ink,
        family=fonts(),
    )
    return [axes.add_patch(box), written]


def token_strip(tokens: Sequence[str], ranges: Sequence[tuple[int, int]] = ()) -> Figure:
    """Draw a prompt's tokens as boxes in reading order, with those inside `ranges` in colour, as a figure."""
    figure = Figure(figsize=(11, 0.32 * len(_lines(tokens)) + 0.15), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_token_strip(axes, tokens)
    mark_strip(axes, tokens, ranges)
    return figure
