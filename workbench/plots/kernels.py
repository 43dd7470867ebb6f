"""Kernel benchmarks as bars: our kernels in colour, the alternatives in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figure import Figure
from .style import ENGINE, QUIET, SPAN

_OURS = ("hopper", "tensor-core", "ours")


def kernel_bars(
    rows: Sequence[Mapping[str, Any]], value: str, unit: str, titles: Mapping[tuple[int, ...], str]
) -> Figure:
    """Draw one panel per shape with one bar per kernel, the longest on top.

    Args:
        rows: a list of the report that `python -m range_kernels.benchmarks --json FILE` writes, such as its "prefill";
            each row has `shape`, `kernel` and the key `value`.
        value: key of the number to plot, such as "tflops".
        unit: its unit, which is added to the titles.
        titles: `{shape: title}` of the panels, in order.

    Raises:
        ValueError: the report has no row of a shape.
    """
    figure = Figure(figsize=(11, 3.4), dpi=100, layout="constrained")
    for axes, (shape, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        found = sorted((row for row in rows if tuple(row["shape"]) == shape), key=lambda row: float(row[value]))
        if not found:
            raise ValueError(f"the report has no row of shape {shape}")
        names = [str(row["kernel"]) for row in found]
        numbers = [float(row[value]) for row in found]
        colours = [(SPAN if "spans" in name else ENGINE) if name.startswith(_OURS) else QUIET for name in names]
        axes.barh(names, numbers, color=colours, height=0.7)
        for index, number in enumerate(numbers):
            axes.text(number, index, f" {number:.3g}", va="center", fontsize=7)
        axes.set_title(f"{title}, {unit}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, max(numbers) * 1.15)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure
