"""A figure of the engine's schedule: which tokens of which request ran in which step, with injected rows in colour."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ..engines.numba_engine.stats import Step, StepChunk
from .figure import Figure
from .style import ENGINE, FLOOR, INK, PAPER, QUIET, SPAN
from .visible_text import drawable

PROMPT = "#b0bec5"
_CACHED = "#e4e9eb"


def schedule_figure(steps: Sequence[Step], labels: Sequence[str] = ()) -> Figure:
    """Draw a lane per request and a column per step, and below them the tokens and the KV pages of each step.

    A chunk of a prompt is a bar whose width is its number of tokens, with injected rows in red; a decode step is a
    narrow bar; tokens taken from the prefix cache are a hatched bar before the first chunk.

    Args:
        steps: `engine.history`, or part of it.
        labels: names of the engine's requests 0, 1, ...; by default, their numbers.
    """
    requests = sorted({chunk.request for step in steps for chunk in step.chunks})
    lanes = {request: lane for lane, request in enumerate(requests)}
    height = min(max(len(lanes), 2) * 0.26, 6.0)  # many requests get thin lanes, not a tall figure
    figure = Figure(figsize=(11, 1.9 + height), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height + 0.3, 1.2])
    most = max((len(chunk) for step in steps for chunk in step.chunks if not chunk.decoding), default=1)
    seen: set[int] = set()
    for column, step in enumerate(steps):
        for chunk in step.chunks:
            lane = lanes[chunk.request]
            if chunk.decoding:
                above.add_patch(Rectangle((column + 0.3, lane + 0.2), 0.4, 0.6, facecolor=ENGINE, linewidth=0))
            else:
                if chunk.cached and chunk.start == chunk.cached and chunk.request not in seen:
                    _cached(above, column, lane, chunk)
                _prefill(above, column, lane, chunk, most)
            seen.add(chunk.request)
    above.set_ylim(len(lanes), 0)
    names = [drawable(labels[request]) if request < len(labels) else str(request) for request in requests]
    every = -(-len(lanes) // 32)
    above.set_yticks([lane + 0.5 for lane in range(0, len(lanes), every)], names[::every], fontsize=7)
    above.set_ylabel("request", fontsize=8)
    above.set_facecolor(PAPER)
    above.legend(
        handles=[
            Patch(facecolor=PROMPT, label="prompt"),
            Patch(facecolor=SPAN, label="injected rows"),
            Patch(facecolor=ENGINE, label="decode"),
            Patch(facecolor=_CACHED, edgecolor=QUIET, hatch="////", label="from the prefix cache"),
        ],
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=7, frameon=False,
    )  # fmt: skip
    _load(below, steps)
    return figure


def _prefill(axes: Axes, column: int, lane: int, chunk: StepChunk, most: int) -> None:
    """Draw a prompt's chunk; its width is its number of tokens, on one scale for the whole figure."""
    scale = 0.92 / most
    left = column + 0.04
    axes.add_patch(
        Rectangle((left, lane + 0.12), scale * len(chunk), 0.76, facecolor=PROMPT, edgecolor=INK, linewidth=0.5)
    )
    for start, stop in chunk.ranges:
        at = left + scale * (start - chunk.start)
        axes.add_patch(Rectangle((at, lane + 0.12), scale * (stop - start), 0.76, facecolor=SPAN, linewidth=0))


def _cached(axes: Axes, column: int, lane: int, chunk: StepChunk) -> None:
    axes.add_patch(
        Rectangle(
            (column - 0.3, lane + 0.12), 0.3, 0.76, facecolor=_CACHED, edgecolor=QUIET, hatch="////", linewidth=0.5
        )
    )
    axes.text(column - 0.34, lane + 0.5, str(chunk.cached), fontsize=6, color=QUIET, ha="right", va="center")


def _load(axes: Axes, steps: Sequence[Step]) -> None:
    """Draw the tokens of each step as stacked bars by kind, and the KV cache's pages in use as a line."""
    columns = [column + 0.5 for column in range(len(steps))]
    decodes = [sum(len(chunk) for chunk in step.chunks if chunk.decoding) for step in steps]
    injected = [sum(stop - start for chunk in step.chunks for start, stop in chunk.ranges) for step in steps]
    texts = [
        sum(len(chunk) for chunk in step.chunks) - each - rows
        for step, each, rows in zip(steps, decodes, injected, strict=True)
    ]
    axes.bar(columns, decodes, width=0.8, color=ENGINE)
    axes.bar(columns, injected, width=0.8, bottom=decodes, color=SPAN)
    axes.bar(columns, texts, width=0.8, bottom=[a + b for a, b in zip(decodes, injected, strict=True)], color=PROMPT)
    axes.set_ylabel("tokens", fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.set_xlim(-0.6 if any(p.cached for step in steps for p in step.chunks) else 0, max(len(steps), 1))
    axes.tick_params(labelsize=7)
    pages = axes.twinx()
    pages.plot(columns, [step.pages_used for step in steps], color=FLOOR, linewidth=1.6)
    pages.set_ylabel("pages in use", fontsize=8, color="#9a6a0c")
    pages.tick_params(labelsize=7)
    pages.set_ylim(0)
