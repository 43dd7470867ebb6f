"""A decode step on a GPU: its kernels in time, and its duration against the bytes that it must read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figure import Figure
from .style import ENGINE, QUIET, SPAN

KINDS = {
    "product": ENGINE,
    "attention": SPAN,
    "norm, rotary, gate": "#b58900",
    "embedding, choice, other": QUIET,
    "copy": "#6c71c4",
}


def step_timeline(report: Mapping[str, Any], detail: float = 110.0) -> Figure:
    """Draw every kernel of a decode step as a bar, one lane per kind: above the whole step, below its first `detail` microseconds.

    Args:
        report: what `python -m workbench.benchmarks timeline --json FILE` writes.
    """
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    kernels = report["kernels"]
    end = max(start + length for start, length, *_ in kernels)
    figure.suptitle(
        f"One decode step of {report['batch']} requests, {len(kernels)} kernels and copies, {end / 1e3:.2f} ms on the GPU "
        f"({report['model']}, {report['device']})",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    for axes, stop in zip(figure.subplots(2, 1), (end, detail), strict=True):
        for lane, (kind, colour) in enumerate(KINDS.items()):
            bars = [(start, length) for start, length, each, _ in kernels if each == kind and start < stop]
            axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colour, linewidth=0)
            busy = sum(length for _, length, each, _ in kernels if each == kind)
            if stop == end:
                axes.text(end * 1.005, lane, f"{busy / 1e3:.2f} ms", va="center", fontsize=7)
        axes.set_yticks(range(len(KINDS)), KINDS, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, stop)
        axes.set_xlabel("microseconds", fontsize=7)
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def step_roofline(report: Mapping[str, Any], tokens: int = 1060) -> Figure:
    """Draw the time of a decode step of 1, 16 and 64 requests against the bytes that it reads, below them the time of a plain copy.

    Args:
        report: what `python -m workbench.benchmarks serving` writes; it has "copied bytes per second".
        tokens: keys per request during the measurement (prompts of 1,024 tokens, 68 new ones).

    Raises:
        ValueError: the report was not made on a GPU, or not with a dense language model.
    """
    missing = [each for each in ("copied bytes per second", "weight bytes", "KV bytes per token") if each not in report]
    if missing:
        raise ValueError(f"the report has no {missing[0]!r}: it must be of a dense language model on a GPU")
    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    batches = (1, 16, 64)
    read = {batch: (report["weight bytes"] + batch * tokens * report["KV bytes per token"]) / 1e9 for batch in batches}
    floor = {batch: read[batch] * 1e12 / report["copied bytes per second"] for batch in batches}
    axes.plot([*read.values()], [*floor.values()], color=QUIET, label="reading at the speed of a copy")
    colours = {"numba": ENGINE, "turbomind": SPAN}
    for name, figures in report["engines"].items():
        rates = {batch: figures.get(f"decode, {batch} at once") for batch in batches}
        taken = {batch: 1e3 * batch / rate for batch, rate in rates.items() if rate}
        axes.plot(
            [read[batch] for batch in taken], [*taken.values()], "o-", color=colours.get(name), label=name, markersize=4
        )
        if name == "numba":
            for batch, value in taken.items():
                axes.annotate(
                    f"{batch} at once: {value:.2f} ms, {value / floor[batch]:.2f} x", (read[batch], value), fontsize=7,
                    xytext=(8, -4), bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, textcoords="offset points",
                )  # fmt: skip
    axes.set_xlim(min(read.values()) * 0.93, max(read.values()) * 1.22)
    axes.set_ylim(0)
    axes.set_xlabel("GB that a step reads at least: weights, keys and values", fontsize=8)
    axes.set_ylabel("ms per step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(f"{report['model']}, {report['dtype']}, {report['device']}", fontsize=8, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
