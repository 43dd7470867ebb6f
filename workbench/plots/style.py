"""Colours and small helpers that all plots share."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from .visible_text import drawable, fonts, label

SPAN = "#d1495b"  # injected rows
ENGINE = "#00798c"
FLOOR = "#edae49"
FAILED = "#c2185b"  # tokens at which the verdict failed
INK = "#222222"
QUIET = "#8a8a8a"
PAPER = "#f4f4f2"


_LINED_TOKENS = 200
"""The largest number of tokens of a plot over which the ends of ranges are lines; with more, a line would hide tokens."""


def mark_spans(axes: Axes, ranges: Sequence[tuple[int, int]]) -> list[Artist]:
    """Mark ranges on a plot whose columns are tokens (`token_axis` comes first); return what was drawn.

    On short prompts the ends are vertical lines; otherwise each range is a bar above the plot, where it hides nothing.
    """
    edges = sorted({edge for pair in ranges for edge in pair})
    first, last = axes.get_xlim()
    if last - first <= _LINED_TOKENS:
        return [axes.axvline(edge - 0.5, color=SPAN, linewidth=1.2) for edge in edges]
    bars: list[Artist] = []
    for start, stop in ranges:
        bars += axes.plot(
            [start - 0.5, max(stop, start + 1) - 0.5], [1.006, 1.006], color=SPAN, linewidth=3.0, solid_capstyle="butt",
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    return bars


def mark_failures(axes: Axes, tokens: Sequence[int]) -> list[Artist]:
    """Draw a triangle above the column of each failing token, so that one among thousands is seen; return what was drawn."""
    if not len(tokens):
        return []
    above = axes.get_xaxis_transform()
    return list(
        axes.plot(tokens, [1.02] * len(tokens), "v", color=FAILED, markersize=5, transform=above, clip_on=False)
    )


LABELLED_TOKENS = 80
"""The largest number of tokens that are written out under a map; with more, positions are shown instead."""


def token_axis(axes: Axes, tokens: Sequence[str]) -> None:
    """Label the columns of a plot with their tokens, or with positions if there are more than `LABELLED_TOKENS`."""
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    if len(tokens) > LABELLED_TOKENS:
        axes.set_xlabel("position", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        return
    axes.set_xticks([])
    for position in range(len(tokens)):
        token_label(axes, tokens, position, color=INK)


def mark_tokens(axes: Axes, tokens: Sequence[str], ranges: Sequence[tuple[int, int]]) -> list[Artist]:
    """Write the labels of the tokens inside ranges again, in colour; return them, so that they can be removed."""
    if len(tokens) > LABELLED_TOKENS:
        return []
    inside = {position for start, stop in ranges for position in range(max(start, 0), min(stop, len(tokens)))}
    return [token_label(axes, tokens, position, color=SPAN) for position in sorted(inside)]


def token_label(axes: Axes, tokens: Sequence[str], position: int, color: str) -> Artist:
    """Write one label under column `position`, as plain text: matplotlib's ticks take five times as long to draw."""
    return axes.text(
        position, -0.03, drawable(label(tokens[position])), rotation=90, ha="center", va="top", fontsize=7,
        family=fonts(), color=color, transform=axes.get_xaxis_transform(),
    )  # fmt: skip


def tap_axis(axes: Axes, taps: Sequence[str]) -> None:
    """Label row i of a plot (y = i) with `taps[i]`, on the left, thinned so that it stays readable; first and last are always shown."""
    short = [drawable(tap).removeprefix("layers.") for tap in taps]
    step = max(1, -(-len(short) // 10))
    at = [*range(0, max(len(short) - step, 1), step), len(short) - 1]
    axes.set_yticks(sorted(set(at)), [short[i] for i in sorted(set(at))], fontsize=7)
    axes.set_ylabel("layer", fontsize=8, labelpad=2)
