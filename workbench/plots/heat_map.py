"""A heat map of hidden states: taps from the bottom up, tokens from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..analysis.state_maps import METRICS, Metric
from .style import mark_spans, mark_tokens, tap_axis, token_axis


def draw_map(
    axes: Axes, values: np.ndarray, taps: Sequence[str], kind: str, bounds: tuple[float, float] | None = None
) -> AxesImage:
    """Draw a metric's `values`, `[taps, positions]`, with tap names on the left and a colour bar; return the image.

    `kind` is a key of `METRICS`. `bounds`: ends of the colour scale, required for a metric that has none of its own.
    """
    metric = METRICS[kind]
    norm = bounded(metric, bounds)
    opaque = colormaps[metric.palette].with_extremes(bad="white")  # transparent cells would show what was drawn before
    image = axes.imshow(
        map_data(values, kind), origin="lower", aspect="auto", cmap=opaque, norm=norm, interpolation="nearest"
    )
    axes.set_title(metric.title, fontsize=9, loc="left")
    tap_axis(axes, taps)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.minorticks_off()
    return image


def bounded(metric: Metric, bounds: tuple[float, float] | None = None) -> Normalize:
    """Return the colour scale of a metric, linear or logarithmic, between `bounds`, by default the metric's own."""
    low, high = bounds or (metric.low, metric.high)
    return LogNorm(low, high) if metric.scale == "log" else Normalize(low, high)


def map_data(values: np.ndarray, kind: str) -> np.ndarray:
    """Mask zeros of the metric "change", so that its logarithmic scale shows them white; others are unchanged."""
    return np.ma.masked_less_equal(values, 0.0) if kind == "change" else values


def hidden_state_map(
    values: np.ndarray,
    taps: Sequence[str],
    tokens: Sequence[str],
    ranges: Sequence[tuple[int, int]] = (),
    kind: str = "change",
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """Draw a map of hidden states as a figure, with token labels below and lines at the ends of `ranges`.

    `values` `[taps, tokens]`; `kind`: a metric of `workbench.analysis.state_maps`; `bounds`: as in `draw_map`.
    """
    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    draw_map(axes, values, taps, kind, bounds)
    token_axis(axes, tokens)
    mark_tokens(axes, tokens, ranges)
    mark_spans(axes, ranges)
    return figure
