"""The probabilities of the likeliest next tokens of two runs, without and with an injection, as bars."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from .style import QUIET, SPAN
from .visible_text import drawable, fonts, label


def draw_next_tokens(axes: Axes, words: Sequence[str], plain: Sequence[float], injected: Sequence[float]) -> None:
    """Clear `axes` and draw two bars per token of `words`: its probability without (`plain`) and with the injection."""
    axes.clear()
    rows = range(len(words))
    axes.barh([row - 0.19 for row in rows], plain, height=0.36, color=QUIET, label="plain")
    axes.barh([row + 0.19 for row in rows], injected, height=0.36, color=SPAN, label="injected")
    axes.set_yticks(list(rows), [drawable(label(word)) for word in words], fontsize=8, family=fonts())
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("next word, probability", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
