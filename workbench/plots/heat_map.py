"""A heat map of hidden states: taps from the bottom up, tokens from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage

from ..analysis.state_maps import METRICS, Metric
from .columns import column_extent, columns_note, tokens_per_column, worst_per_column
from .figure import Figure
from .style import mark_failures, mark_spans, mark_tokens, tap_axis, token_axis

NOT_FINITE = "#ff00ff"
"""The colour of a state that contains NaN or infinity."""


def draw_map(
    axes: Axes, values: np.ndarray, taps: Sequence[str], kind: str, bounds: tuple[float, float] | None = None
) -> AxesImage:
    """Draw a metric's `values`, `[taps, positions]`, with tap names on the left and a colour bar; return the image.

    With more positions than columns fit, a column shows the worst of its positions, and the title says how many there are.

    Args:
        kind: a key of `METRICS`.
        bounds: ends of the colour scale, required for a metric that has none of its own.
    """
    metric = METRICS[kind]
    norm = bounded(metric, bounds)
    # Not transparent: transparent cells would show what was drawn before.
    colours = colormaps[metric.palette].with_extremes(bad="white", over=NOT_FINITE)
    rows, tokens = values.shape
    per_column = tokens_per_column(tokens)
    image = axes.imshow(
        map_data(values, kind, norm), origin="lower", aspect="auto", cmap=colours, norm=norm,
        interpolation="nearest", extent=column_extent(rows, tokens, per_column),
    )  # fmt: skip
    axes.set_title(
        f"{metric.title}{columns_note(per_column, metric.worst == 'lowest')}", fontsize=9, loc="left", pad=10
    )
    tap_axis(axes, taps)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, extend="neither")
    bar.ax.tick_params(labelsize=7)
    bar.minorticks_off()
    return image


def bounded(metric: Metric, bounds: tuple[float, float] | None = None) -> Normalize:
    """Return the colour scale of a metric, linear or logarithmic, between `bounds`, by default the metric's own."""
    low, high = bounds or (metric.low, metric.high)
    return LogNorm(low, high) if metric.scale == "log" else Normalize(low, high)


def map_data(values: np.ndarray, kind: str, scale: Normalize) -> np.ndarray:
    """The numbers of a metric's image: the worst of each column, clipped to the ends of the colour scale.

    Masked, and so white: NaN (not computed) and, on a logarithmic scale, 0. Infinity (a state that is not finite) is outside
    the scale, where `draw_map` has a colour of its own for it.
    """
    metric = METRICS[kind]
    worst = worst_per_column(values, tokens_per_column(values.shape[1]), metric.worst == "lowest")
    blank = np.isnan(worst) | (worst == 0.0 if metric.scale == "log" else False)
    low, high = cast(float, scale.vmin), cast(float, scale.vmax)
    inside = np.clip(worst, low, high - 1e-6 * (high - low))  # rounded, the end itself could be above the scale
    outside = high * 2.0 + 1.0
    return np.ma.masked_where(blank, np.where(np.isinf(worst), outside, inside))


def hidden_state_map(
    values: np.ndarray,
    taps: Sequence[str],
    tokens: Sequence[str],
    ranges: Sequence[tuple[int, int]] = (),
    kind: str = "change",
    bounds: tuple[float, float] | None = None,
    failures: Sequence[int] = (),
) -> Figure:
    """Draw a map of hidden states as a figure, with token labels below and the `ranges` marked.

    `values` `[taps, tokens]`; `kind`: a metric of `workbench.analysis.state_maps`; `bounds`: as in `draw_map`; `failures`: tokens
    at which the verdict failed, marked above the map.
    """
    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    draw_map(axes, values, taps, kind, bounds)
    token_axis(axes, tokens)
    mark_tokens(axes, tokens, ranges)
    mark_spans(axes, ranges)
    mark_failures(axes, failures)
    return figure
