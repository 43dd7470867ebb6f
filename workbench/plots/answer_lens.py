"""Draw the logit lens of an answer: a column per generated token, a row per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .figure import Figure
from .style import INK
from .visible_text import drawable, label

if TYPE_CHECKING:
    from ..analysis.answer_lens import AnswerLens

_MOST_ROWS = 48  # beyond that, words would be too small to read


def answer_lens_figure(lens: AnswerLens) -> Figure:
    """Draw what each layer would have said at every token of an answer; darker: more probable; bold: what was said in the end.

    Of more than 48 layers, every second, third, ... is drawn, and the first and the last.
    """
    count, step = len(lens.tokens), -(-len(lens.taps) // _MOST_ROWS)
    rows = sorted({*range(len(lens.taps) - 1, -1, -step), 0})
    figure = Figure(figsize=(max(1.25 * count + 1.6, 4.0), 0.24 * len(rows) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(lens.chances[rows], aspect="auto", origin="lower", cmap="GnBu", vmin=0.0, vmax=1.3)
    for line, row in enumerate(rows):
        for number in range(count):
            word = lens.words[row][number]
            axes.text(
                number, line, drawable(label(repr(word)[1:-1], 12)), ha="center", va="center", fontsize=7, color=INK,
                weight="bold" if lens.likeliest[row, number] == lens.tokens[number] else "normal",
            )  # fmt: skip
    names = [drawable(label(repr(text), 14)) for text in lens.texts]
    axes.set_xticks(np.arange(count), names, fontsize=8)
    axes.set_yticks(np.arange(len(rows)), [lens.taps[row] for row in rows], fontsize=7)
    axes.set_xlabel("answer", fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure
