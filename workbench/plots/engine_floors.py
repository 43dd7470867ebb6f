"""Several engines' errors in noise floors, tap by tap, in one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figure import Figure
from .style import FAILED, FLOOR, INK, QUIET

_COLOURS = ("#00798c", "#7a5195", "#2f6f3e", "#a05195", "#5b5ea6")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))


def floors_by_tap(engines: Mapping[str, tuple[Sequence[str], Sequence[float]]], factor: float) -> Figure:
    """Plot for each engine the largest error over tokens at every tap, divided by the noise floor of its dtype.

    Args:
        engines: by name ("engine, variant"), taps in order and the ratio at each. Variants of one engine share a colour.
        factor: the ratio up to which an error is rounding; what is above is drawn in the colour of failures.
    """
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    longest = max((taps for taps, _ in engines.values()), key=len, default=())
    place = {tap: number for number, tap in enumerate(longest)}
    families = list(dict.fromkeys(name.split(",")[0] for name in engines))
    used: dict[str, int] = dict.fromkeys(families, 0)
    for name, (taps, floors) in engines.items():
        family = name.split(",")[0]
        known = [(place[tap], ratio) for tap, ratio in zip(taps, floors, strict=True) if tap in place]
        xs, ys = [at for at, _ in known], [max(ratio, 0.02) for _, ratio in known]
        wrong = max(floors, default=0.0) > factor
        axes.plot(
            xs, ys, linestyle=_DASHES[used[family] % len(_DASHES)], linewidth=2.2 if wrong else 1.3, label=name,
            color=FAILED if wrong else _COLOURS[families.index(family) % len(_COLOURS)],
        )  # fmt: skip
        used[family] += 1
    axes.axhspan(0.01, factor, color=FLOOR, alpha=0.15, linewidth=0)
    axes.axhline(factor, color=QUIET, linewidth=0.8)
    axes.text(
        0.995, factor * 1.1, f"{factor:g} floors: more is a bug", fontsize=8, color=INK, ha="right",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0, max(len(longest) - 1, 1))
    axes.set_ylim(bottom=0.05)
    whole = [number for number, tap in enumerate(longest) if tap.count(".") == 1]  # layers, without their parts
    shown = (
        [0, *whole[4 :: max(1, len(whole) // 10)], len(longest) - 1] if len(whole) > 5 else list(range(len(longest)))
    )
    axes.set_xticks(shown, [longest[number].removeprefix("layers.") for number in shown], fontsize=8)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("error / noise floor", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    if engines:
        axes.legend(fontsize=7.5, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
