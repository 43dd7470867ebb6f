"""An engine's error compared with the noise floor: by layer, and as a map over taps and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from ..comparison import Comparison, LocalError
from .columns import column_extent, columns_note, tokens_per_column, worst_per_column
from .figure import Figure
from .style import ENGINE, FAILED, FLOOR, SPAN, mark_failures, mark_spans, mark_tokens, tap_axis, token_axis
from .visible_text import without_math


def error_by_layer(comparison: Comparison) -> Figure:
    """Plot the largest relative error over tokens at every tap, with the noise floor and the band of allowed errors.

    The band reaches from the noise floor to `comparison.factor` times it.
    """
    figure = Figure(figsize=(11, 3.2), dpi=100, layout="constrained")
    _draw_errors(figure.add_subplot(), comparison)
    return figure


def local_error_by_layer(errors: LocalError) -> Figure:
    """Plot the errors that accumulate from tap to tap above those that each layer adds on the engine's own input, each with its floor."""
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title("accumulated: the whole run", fontsize=9, loc="left")
    _draw_errors(above, errors.accumulated)
    below.set_title("local: each layer on the engine's own input", fontsize=9, loc="left")
    _draw_errors(below, errors.local)
    return figure


def ratio_map(comparison: Comparison, tokens: Sequence[str], ranges: Sequence[tuple[int, int]] = ()) -> Figure:
    """Plot error / noise floor at every tap and token, as a heat map.

    Up to 1 the error is no larger than the reference's own rounding error in this dtype; above `comparison.factor` it
    is a bug. `tokens` are all tokens of the prompt as text, `ranges` its embedding ranges.
    """
    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    _draw_map(figure.add_subplot(), comparison, tokens, ranges)
    return figure


def comparison_figure(comparison: Comparison, tokens: Sequence[str], ranges: Sequence[tuple[int, int]] = ()) -> Figure:
    """Draw `error_by_layer`, with the verdict as its title, above `ratio_map`; arguments as there."""
    figure = Figure(figsize=(11, 7.4), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 4))
    above.set_title(without_math("\n".join(wrap(str(comparison), 150))), fontsize=9, loc="left")
    _draw_errors(above, comparison)
    _draw_map(below, comparison, tokens, ranges)
    return figure


def _draw_errors(axes: Axes, comparison: Comparison) -> None:
    rows = comparison.table()
    at = np.arange(len(rows))
    tiny = np.finfo(np.float32).tiny
    floor = np.array([row["floor"] for row in rows], dtype=float)
    error = np.array([max(float(row["error"]), tiny) for row in rows])
    finite = np.isfinite(error)
    largest = max(error[finite].max(initial=0.0), floor.max() * comparison.factor) * 3
    smallest = min(floor.min(), max(error[finite].min(initial=floor.min()), floor.min() / 100)) / 3
    axes.fill_between(
        at, floor, floor * comparison.factor, color=FLOOR, alpha=0.3, linewidth=0, label="explained by rounding"
    )
    axes.plot(at, floor, color=FLOOR, linewidth=1.5, label=f"noise floor (Transformers, {comparison.dtype})")
    axes.plot(
        at,
        np.where(finite, error, np.nan),
        color=ENGINE,
        linewidth=1.5,
        marker=".",
        markersize=4,
        label=without_math(f"{comparison.engine}, {comparison.dtype}"),
    )
    if comparison.first_divergence is not None:
        index = comparison.taps.index(comparison.first_divergence.tap)
        axes.axvline(index, color=SPAN, linewidth=1.2, label=f"first divergence: {comparison.first_divergence.tap}")
    axes.set_yscale("log")
    axes.set_ylim(smallest, largest)
    if not finite.all():
        above = axes.get_xaxis_transform()
        axes.plot(at[~finite], np.full((~finite).sum(), 0.97), "x", color=FAILED, transform=above, label="not finite")
    step = max(1, len(rows) // 16)
    axes.set_xticks(
        at[::step], [str(rows[i]["tap"]).removeprefix("layers.") for i in at[::step]], fontsize=7, rotation=30
    )
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylabel("relative error to float64", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="best", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_map(axes: Axes, comparison: Comparison, tokens: Sequence[str], ranges: Sequence[tuple[int, int]]) -> None:
    ratios = np.nan_to_num(comparison.ratios.numpy(), nan=np.inf, posinf=1e12)
    spread = comparison.factor**2
    rows, positions = ratios.shape
    per_column = tokens_per_column(positions)
    image = axes.imshow(
        np.clip(worst_per_column(ratios, per_column), 1 / spread, spread), origin="lower", aspect="auto", cmap="RdYlBu_r",
        norm=LogNorm(1 / spread, spread), interpolation="nearest", extent=column_extent(rows, positions, per_column),
    )  # fmt: skip
    more = columns_note(per_column)
    axes.set_title(
        f"error in noise floors (up to {comparison.factor:g} is noise){more}", fontsize=9, loc="left", pad=10
    )
    columns = comparison.columns(ranges)
    tap_axis(axes, comparison.taps)
    shown = [tokens[int(position)] for position in comparison.positions]
    token_axis(axes, shown)
    mark_tokens(axes, shown, columns)
    mark_spans(axes, columns)
    mark_failures(axes, comparison.failing)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=7)
