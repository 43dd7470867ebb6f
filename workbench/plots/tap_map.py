"""Draw the diagram of a model's taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.patches import FancyBboxPatch

from .figure import Figure
from .style import INK
from .visible_text import drawable

_SHOWN = 12  # layers; of a deeper model the middle is left out


def tap_map_figure(
    layers: Sequence[Mapping[str, Any]], ends: Sequence[str], spans: Sequence[str], chosen: str = ""
) -> Figure:
    """Draw the taps from the splice at the bottom to the final norm at the top; of more than 12 layers, the first and last six.

    Args:
        layers: for each its "number" and its "taps".
        ends: which of "embed" and "norm" there are.
        spans: what enters at the splice.
        chosen: the tap that is filled.
    """
    shown: list[Mapping[str, Any] | None] = list(layers)
    if len(layers) > _SHOWN:
        shown = [*layers[: _SHOWN // 2], None, *layers[-_SHOWN // 2 :]]
    height = len(shown) + 3
    figure = Figure(figsize=(4.2, 0.34 * height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.2, height)

    def box(x: float, y: float, width: float, text: str, tap: str) -> None:
        filled = tap == chosen
        axes.add_patch(
            FancyBboxPatch(
                (x, y + 0.12), width, 0.66, boxstyle="round,pad=0.02", fc="#1976d2" if filled else "white", ec="#888888", lw=0.8
            )
        )  # fmt: skip
        axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=7, color="white" if filled else INK)

    axes.text(
        5,
        0.45,
        drawable("  ".join(spans[:4]) + ("  ..." if len(spans) > 4 else "")) or "no ranges",
        ha="center",
        fontsize=7,
    )
    if "embed" in ends:
        box(0.5, 1, 9, "embed: token embeddings and spliced rows", "embed")
    for line, layer in enumerate(shown):
        if layer is None:
            axes.text(5, line + 2.35, "...", ha="center", fontsize=9)
            continue
        number = layer["number"]
        parts = {f"layers.{number}.attention": (0.9, 3.1, "attention"), f"layers.{number}.mlp": (4.2, 2.2, "mlp"), f"layers.{number}": (6.6, 2.9, f"layers.{number}")}  # fmt: skip
        for tap in layer["taps"]:
            x, width, text = parts[tap]
            box(x, line + 2, width, text, tap)
    if "norm" in ends:
        box(0.5, len(shown) + 2, 9, "norm, then the head", "norm")
    return figure
