"""A figure of a batch plan: the packed batches, one bar per chunk of a prompt, and for comparison one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..prompt import Prompt
from ..prompt.packing import BatchPlan
from ..prompt.ranges import clip
from .figure import Figure
from .style import FLOOR, INK, PAPER, QUIET, SPAN

_SHADES = ("#cfd8dc", "#b0bec5")


def plan_figure(plan: BatchPlan, prompts: Sequence[Prompt]) -> Figure:
    """Draw the packed batches of `plan` above, and one padded batch of the same prompts below.

    Widths are numbers of tokens on one scale; embedding ranges are red. `prompts` are those that were planned, in
    order.
    """
    rows = len(plan.batches), len(prompts)
    figure = Figure(figsize=(11, 1.1 + 0.28 * sum(rows)), dpi=100, layout="constrained")
    packed, padded = figure.subplots(2, 1, sharex=True, height_ratios=[rows[0] + 1, rows[1] + 1])
    for row, batch in enumerate(plan.batches):
        at = 0
        for chunk in batch:
            _bar(packed, row, at, chunk.start, chunk.stop, chunk.prompt, prompts[chunk.prompt])
            at += len(chunk)
        _empty(packed, row, at, plan.max_tokens, PAPER)
    longest = max(plan.lengths)
    for row, prompt in enumerate(prompts):
        _bar(padded, row, 0, 0, len(prompt), row, prompt)
        _empty(padded, row, len(prompt), longest, FLOOR)
    _finish(packed, rows[0], f"packed: {sum(plan.lengths)} tokens in {rows[0]} batches of {plan.max_tokens}", "batch")
    _finish(padded, rows[1], f"padded: {plan.padded_tokens} tokens, {plan.padding} of them padding (yellow)", "prompt")
    padded.set_xlim(0, max(plan.max_tokens, longest))
    padded.set_xlabel("tokens (red: ranges with embeddings)", fontsize=8)
    return figure


def _bar(axes: Axes, row: int, at: int, start: int, stop: int, number: int, prompt: Prompt) -> None:
    """Draw the tokens `[start, stop)` of a prompt, beginning at column `at`."""
    shade = _SHADES[number % 2]
    axes.add_patch(Rectangle((at, row + 0.1), stop - start, 0.8, facecolor=shade, edgecolor=INK, linewidth=0.8))
    for _, (first, last) in clip(prompt.embedding_ranges, start, stop):
        axes.add_patch(Rectangle((at + first - start, row + 0.18), last - first, 0.64, facecolor=SPAN, linewidth=0))
    axes.text(at + (stop - start) / 2, row + 0.5, str(number), ha="center", va="center", fontsize=7, color=INK)


def _empty(axes: Axes, row: int, start: int, stop: int, colour: str) -> None:
    if stop > start:
        axes.add_patch(
            Rectangle(
                (start, row + 0.1), stop - start, 0.8, facecolor=colour, edgecolor=QUIET, linewidth=0.4, hatch="///"
            )
        )


def _finish(axes: Axes, rows: int, title: str, label: str) -> None:
    axes.set_ylim(rows, 0)
    axes.set_yticks([row + 0.5 for row in range(rows)], [str(row) for row in range(rows)], fontsize=7)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9, loc="left")
