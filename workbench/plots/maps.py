"""A heat map of hidden states: taps from the bottom up, tokens from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .style import mark_spans, mark_tokens, tap_axis, token_axis

KINDS = {
    "change": ("change by the injection, |Δ| / |plain|; white: exactly none", "magma_r", LogNorm(1e-3, 3.0)),
    "cosine": ("cosine to the plain run", "viridis", Normalize(0.0, 1.0)),
}


def draw_map(axes: Axes, values: np.ndarray, taps: Sequence[str], kind: str) -> AxesImage:
    """Draw `values` `[taps, positions]` with taps on the left and a colour bar."""
    title, colours, norm = KINDS[kind]
    opaque = colormaps[colours].with_extremes(bad="white")  # transparent cells would show what was drawn before
    image = axes.imshow(
        map_data(values, kind), origin="lower", aspect="auto", cmap=opaque, norm=norm, interpolation="nearest"
    )
    axes.set_title(title, fontsize=9, loc="left")
    tap_axis(axes, taps)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.minorticks_off()
    return image


def map_data(values: np.ndarray, kind: str) -> np.ndarray:
    """Exact zeros of a change are masked, so that they stay white on a logarithmic scale."""
    return np.ma.masked_less_equal(values, 0.0) if kind == "change" else values


def hidden_state_map(
    values: np.ndarray,
    taps: Sequence[str],
    tokens: Sequence[str],
    ranges: Sequence[tuple[int, int]] = (),
    kind: str = "change",
) -> Figure:
    """A figure of one map. `kind`: "change" (log scale) or "cosine"."""
    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    draw_map(axes, values, taps, kind)
    token_axis(axes, tokens)
    mark_tokens(axes, tokens, ranges)
    mark_spans(axes, ranges)
    return figure
