"""Images with their patch grids: which patch is which token, coloured by one number per patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True)
class PatchGrid:
    """The patches of an image or of one of its frames, or a strip of rows if there is no image.

    Attributes:
        title: written above the grid.
        lines, columns: size of the grid; rows fill it line by line, from the left.
        values: one number per patch, `[lines, columns]`; patches with NaN are not coloured, None colours no patch.
    """

    title: str
    lines: int
    columns: int
    image: Image.Image | None = None
    values: np.ndarray | None = None


def grids_figure(
    grids: Sequence[PatchGrid], norm: Normalize, colours: Colormap, opacity: float = 0.55, caption: str = ""
) -> Figure:
    """Draw images side by side with their patch grids, coloured by their values."""
    figure = Figure(figsize=(11, 3.2 if grids else 0.6), dpi=100, layout="compressed")
    if not grids:
        figure.text(0.02, 0.3, "this prompt has no images")
        return figure
    coloured = None
    every = list(np.atleast_1d(figure.subplots(1, len(grids))))
    for axes, grid in zip(every, grids, strict=True):
        extent, aspect = (0, grid.columns, grid.lines, 0), cast(Any, "auto")
        if grid.image is not None:
            aspect = grid.image.height / grid.lines * grid.columns / grid.image.width
            axes.imshow(grid.image, extent=extent, aspect=aspect)
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
