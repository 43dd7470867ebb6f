"""The engine's schedule as a picture: which tokens of which request ran in which step, ranges coloured."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..engines.numba_engine.stats import Step, StepPiece
from .style import ENGINE, FLOOR, INK, PAPER, QUIET, SPAN

PROMPT = "#b0bec5"
_CACHED = "#e4e9eb"


def schedule_figure(steps: Sequence[Step], labels: Sequence[str] = ()) -> Figure:
    """Requests are lanes, steps are columns; tokens and pages of each step below.

    A prompt's piece fills its cell from left to right in token order, injected rows in red; a decode step is a bar; what the prefix
    cache held stands hatched before the first piece.

    Args:
        steps: `engine.history`, or part of it.
        labels: what to call request 0, 1, ... of the engine; their numbers else.
    """
    requests = sorted({piece.request for step in steps for piece in step.pieces})
    lanes = {request: lane for lane, request in enumerate(requests)}
    height = min(max(len(lanes), 2) * 0.26, 6.0)  # many requests get thin lanes, not a tall picture
    figure = Figure(figsize=(11, 1.9 + height), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height + 0.3, 1.2])
    most = max((len(piece) for step in steps for piece in step.pieces if not piece.decoding), default=1)
    seen: set[int] = set()
    for column, step in enumerate(steps):
        for piece in step.pieces:
            lane = lanes[piece.request]
            if piece.decoding:
                above.add_patch(Rectangle((column + 0.3, lane + 0.2), 0.4, 0.6, facecolor=ENGINE, linewidth=0))
            else:
                if piece.cached and piece.start == piece.cached and piece.request not in seen:
                    _cached(above, column, lane, piece)
                _prefill(above, column, lane, piece, most)
            seen.add(piece.request)
    above.set_ylim(len(lanes), 0)
    names = [labels[request] if request < len(labels) else str(request) for request in requests]
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


def _prefill(axes: Axes, column: int, lane: int, piece: StepPiece, most: int) -> None:
    """Width says how many tokens, to one scale over the picture; numbers say which."""
    scale = 0.92 / most
    left = column + 0.04
    axes.add_patch(
        Rectangle((left, lane + 0.12), scale * len(piece), 0.76, facecolor=PROMPT, edgecolor=INK, linewidth=0.5)
    )
    for start, stop in piece.ranges:
        at = left + scale * (start - piece.start)
        axes.add_patch(Rectangle((at, lane + 0.12), scale * (stop - start), 0.76, facecolor=SPAN, linewidth=0))


def _cached(axes: Axes, column: int, lane: int, piece: StepPiece) -> None:
    axes.add_patch(
        Rectangle(
            (column - 0.3, lane + 0.12), 0.3, 0.76, facecolor=_CACHED, edgecolor=QUIET, hatch="////", linewidth=0.5
        )
    )
    axes.text(column - 0.34, lane + 0.5, str(piece.cached), fontsize=6, color=QUIET, ha="right", va="center")


def _load(axes: Axes, steps: Sequence[Step]) -> None:
    """Stacked bars: tokens of each step by kind; a line: pages of the KV cache in use."""
    columns = [column + 0.5 for column in range(len(steps))]
    decodes = [sum(len(piece) for piece in step.pieces if piece.decoding) for step in steps]
    injected = [sum(stop - start for piece in step.pieces for start, stop in piece.ranges) for step in steps]
    texts = [
        sum(len(piece) for piece in step.pieces) - each - rows
        for step, each, rows in zip(steps, decodes, injected, strict=True)
    ]
    axes.bar(columns, decodes, width=0.8, color=ENGINE)
    axes.bar(columns, injected, width=0.8, bottom=decodes, color=SPAN)
    axes.bar(columns, texts, width=0.8, bottom=[a + b for a, b in zip(decodes, injected, strict=True)], color=PROMPT)
    axes.set_ylabel("tokens", fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.set_xlim(-0.6 if any(p.cached for step in steps for p in step.pieces) else 0, max(len(steps), 1))
    axes.tick_params(labelsize=7)
    pages = axes.twinx()
    pages.plot(columns, [step.pages_used for step in steps], color=FLOOR, linewidth=1.6)
    pages.set_ylabel("pages in use", fontsize=8, color="#9a6a0c")
    pages.tick_params(labelsize=7)
    pages.set_ylim(0)
