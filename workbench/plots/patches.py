"""Pictures and the prompt they went into: which patch is which token, and what a moved range covers and bares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..patch_map import PatchMap, patch_of
from .style import FLOOR, INK, PAPER, QUIET, SPAN, visible

_ROOM = 150  # widths of a small box in a line


def patch_figure(shown: PatchMap) -> Figure:
    """Pictures with their patches above, the prompt as boxes below."""
    lines = _lines(shown)
    strip = 0.3 * len(lines) + 0.35
    figure = Figure(figsize=(11, 3.1 + strip), dpi=100)
    share = strip / (3.1 + strip)
    columns = max(3, len(shown.pictures))
    for number, picture in enumerate(shown.pictures):
        axes = figure.add_axes((0.01 + number * 0.98 / columns, share + 0.02, 0.94 / columns, 0.9 - share))
        _draw_picture(axes, shown, number, picture)
    _draw_strip(figure.add_axes((0, 0.01, 1, share)), shown, lines)
    return figure


@dataclass(frozen=True)
class PatchGrid:
    """A picture, or a frame of one, in patches; or a strip of rows where it is none.

    Attributes:
        title: written above; rows go into the lines from the left.
        values: a number for each patch, `[lines, columns]`; NaN is left bare, None colours none.
    """

    title: str
    lines: int
    columns: int
    picture: Image.Image | None = None
    values: np.ndarray | None = None


def grids_figure(
    grids: Sequence[PatchGrid], norm: Normalize, colours: Colormap, opacity: float = 0.55, caption: str = ""
) -> Figure:
    """Pictures side by side with their patches, coloured by their values."""
    figure = Figure(figsize=(11, 3.2 if grids else 0.6), dpi=100, layout="compressed")
    if not grids:
        figure.text(0.02, 0.3, "this prompt holds no pictures")
        return figure
    coloured = None
    every = list(np.atleast_1d(figure.subplots(1, len(grids))))
    for axes, grid in zip(every, grids, strict=True):
        extent, aspect = (0, grid.columns, grid.lines, 0), cast(Any, "auto")
        if grid.picture is not None:
            aspect = grid.picture.height / grid.lines * grid.columns / grid.picture.width
            axes.imshow(grid.picture, extent=extent, aspect=aspect)
        if grid.values is not None:
            coloured = axes.imshow(
                np.ma.masked_invalid(np.clip(grid.values, norm.vmin, norm.vmax)),
                cmap=colours, norm=norm, alpha=opacity, interpolation="nearest", extent=extent, aspect=aspect,
            )  # fmt: skip
        axes.set_xticks(range(grid.columns + 1), [])
        axes.set_yticks(range(grid.lines + 1), [])
        axes.grid(color="white", linewidth=0.6)
        axes.set_xlim(0, grid.columns)
        axes.set_ylim(grid.lines, 0)
        axes.set_title(grid.title, fontsize=8)
    if coloured is not None:
        bar = figure.colorbar(coloured, ax=every, pad=0.01, fraction=0.03, format="%.3g")
        bar.ax.tick_params(labelsize=7, which="both")
        bar.ax.yaxis.set_minor_formatter("{x:.3g}")
        bar.set_label(caption, fontsize=8)
    return figure


def _draw_picture(axes: Axes, shown: PatchMap, number: int, picture: Image.Image) -> None:
    grid = shown.prompt.spans[number].grid or (1, 1)
    rows, columns = grid[-2], grid[-1]
    width, height = picture.size
    axes.imshow(picture)
    for column in range(1, columns):
        axes.axvline(column * width / columns - 0.5, color="white", linewidth=0.7, alpha=0.8)
    for row in range(1, rows):
        axes.axhline(row * height / rows - 0.5, color="white", linewidth=0.7, alpha=0.8)
    start, stop = shown.moved[number]
    for row in range(rows * columns):
        y, x = patch_of(row, grid)
        axes.text(
            (x + 0.06) * width / columns, (y + 0.3) * height / rows, str(start + row), fontsize=5.5, color="white",
            path_effects=_outline(),
        )  # fmt: skip
    title = f"picture {number}: rows at tokens [{start}, {stop})"
    if shown.chosen and shown.chosen[0] == number:
        y, x = patch_of(shown.chosen[1], grid)
        axes.add_patch(
            Rectangle((x * width / columns - 0.5, y * height / rows - 0.5), width / columns, height / rows,
                      facecolor="none", edgecolor=SPAN, linewidth=2.5)
        )  # fmt: skip
        title += f"\npatch ({y}, {x}) is token {start + shown.chosen[1]}"
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def _outline() -> list:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.4, foreground="black")]


def _label(shown: PatchMap, position: int, kind: str) -> str:
    return "" if kind in ("row", "bare") else visible(shown.tokens[position])


def _lines(shown: PatchMap) -> list[list[tuple[int, str, float, float]]]:
    """Boxes in lines: (position, kind, left, width) of each."""
    lines: list[list[tuple[int, str, float, float]]] = [[]]
    at = 0.0
    for position, kind in enumerate(shown.kinds()):
        width = max(1.0, len(_label(shown, position, kind)) * 1.25 + 0.4)
        if at + width > _ROOM:
            lines.append([])
            at = 0.0
        lines[-1].append((position, kind, at, width))
        at += width + 0.25
    return lines


def _draw_strip(axes: Axes, shown: PatchMap, lines: list[list[tuple[int, str, float, float]]]) -> None:
    fills = {"text": PAPER, "row": SPAN, "lost": "#6a1b2a", "bare": FLOOR}
    marked = shown.moved[shown.chosen[0]][0] + shown.chosen[1] if shown.chosen else -1
    for number, line in enumerate(lines):
        for position, kind, left, width in line:
            edge, thick = (INK, 2.0) if position == marked else ("#d8d8d4", 0.5)
            box = Rectangle((left, number + 0.12), width, 0.6, facecolor=fills[kind], edgecolor=edge, linewidth=thick)
            axes.add_patch(box)
            label = _label(shown, position, kind)
            if label:
                ink = INK if kind == "text" else "white"
                axes.text(
                    left + width / 2,
                    number + 0.43,
                    label,
                    ha="center",
                    va="center",
                    fontsize=7,
                    family="monospace",
                    color=ink,
                )
    axes.text(
        0, len(lines) + 0.35, "grey: text · red: a picture's row over its placeholder · dark: a row over a text token, which is lost · "
        "yellow: a placeholder left bare", fontsize=7, color=QUIET, va="center",
    )  # fmt: skip
    axes.set_xlim(-0.5, _ROOM + 1)
    axes.set_ylim(len(lines) + 0.7, -0.05)
    axes.axis("off")
