"""Draw images with the grid of patches that the vision tower turns into tokens, coloured by a number per patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from matplotlib.colors import Colormap, Normalize
from PIL import Image

from .figure import Figure

_IN_A_ROW = 6
_LINED = 4096  # cells; lines between more would hide them


@dataclass(frozen=True)
class PatchGrid:
    """The grid of patches of one image (or one frame of it). A patch is one feature row, and one token of the prompt.

    Attributes:
        title: text above the grid.
        lines, columns: size of the grid; patches are in row-major order.
        image: drawn behind the grid; None draws the grid alone, for items without an image.
        values: a number per patch, `[lines, columns]`; a patch with NaN is not coloured, and None colours none.
    """

    title: str
    lines: int
    columns: int
    image: Image.Image | None = None
    values: np.ndarray | None = None


def grids_figure(
    grids: Sequence[PatchGrid], norm: Normalize, colours: Colormap, opacity: float = 0.55, caption: str = ""
) -> Figure:
    """Draw the grids over their images, up to six in a row, with patches coloured by their values.

    `norm` and `colours` map values to colours, `opacity` is that of the colours over the image, `caption` labels the
    colour bar.
    """
    if not grids:
        figure = Figure(figsize=(11, 0.6), dpi=100)
        figure.text(0.02, 0.3, "this prompt has no images")
        return figure
    columns = min(len(grids), _IN_A_ROW)
    rows = -(-len(grids) // columns)
    figure = Figure(
        figsize=(11, 3.2 if rows == 1 else 2.1 * rows), dpi=100, layout="compressed" if rows == 1 else "constrained"
    )
    coloured = None
    every = list(np.ravel(figure.subplots(rows, columns)))
    for axes in every[len(grids) :]:
        axes.set_axis_off()
    for axes, grid in zip(every, grids, strict=False):
        extent, aspect = (0, grid.columns, grid.lines, 0), cast(Any, "auto")
        if grid.image is not None:
            aspect = grid.image.height / grid.lines * grid.columns / grid.image.width
            axes.imshow(grid.image, extent=extent, aspect=aspect)
        if grid.values is not None:
            low, high = cast(float, norm.vmin), cast(float, norm.vmax)
            # Infinity, a state that is not finite, is above the scale, where `colours` has a colour of its own.
            inside = np.where(
                np.isinf(grid.values), 2.0 * high + 1.0, np.clip(grid.values, low, high - 1e-6 * (high - low))
            )
            coloured = axes.imshow(
                np.ma.masked_invalid(inside),
                cmap=colours, norm=norm, alpha=opacity, interpolation="nearest", extent=extent, aspect=aspect,
            )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        if grid.columns * grid.lines <= _LINED:
            edges = {"color": "white", "linewidth": 0.6}
            axes.vlines(range(1, grid.columns), 0, grid.lines, **edges)
            axes.hlines(range(1, grid.lines), 0, grid.columns, **edges)
        axes.set_xlim(0, grid.columns)
        axes.set_ylim(grid.lines, 0)
        axes.set_title(grid.title, fontsize=8)
    if coloured is not None:
        bar = figure.colorbar(coloured, ax=every, pad=0.01, fraction=0.03, format="%.3g")
        bar.ax.tick_params(labelsize=7, which="both")
        bar.ax.yaxis.set_minor_formatter("{x:.3g}")
        bar.set_label(caption, fontsize=8)
    return figure
