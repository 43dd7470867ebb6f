"""Draw how far patches move an answer: a row per layer, a column per group of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .figure import Figure
from .style import INK
from .visible_text import drawable, label

if TYPE_CHECKING:
    from ..analysis.patching import PatchEffects

_NUMBERED = 40  # rows; with more, numbers would be too small to read


def patching_figure(effects: PatchEffects) -> Figure:
    """Draw the shares of `PatchEffects.shares`: white leaves the answer, dark red makes it that of the other run; grey was not run.

    Blue moves it the other way. Colours end at 100 %.
    """
    shares = effects.shares()
    rows, columns = shares.shape
    figure = Figure(figsize=(1.3 * columns + 2.2, 0.22 * rows + 1.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shares, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1.0, vmax=1.0)
    for row, column in np.argwhere(np.isfinite(shares)) if rows <= _NUMBERED else ():
        share = shares[row, column]
        colour = "white" if abs(share) > 0.7 else INK
        axes.text(column, row, f"{round(share, 2) + 0.0:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(np.arange(columns), [drawable(label(name)) for name in effects.groups], fontsize=8)
    step = -(-rows // _NUMBERED)
    axes.set_yticks(np.arange(0, rows, step), effects.taps[::step], fontsize=7)
    axes.tick_params(length=0)
    mine, theirs = (drawable(label(repr(word), 16)) for word in reversed(effects.words))
    state = "" if effects.complete else "; cancelled before the end"
    axes.set_title(f"how far the answer moves from {mine} to {theirs}{state}", fontsize=9)
    figure.colorbar(image, ax=axes, format=lambda share, at: f"{share:.0%}", fraction=0.05)
    return figure
