"""An interactive map of hidden states: a cell per tap and token, coloured by a metric; linked with other views."""

from __future__ import annotations

from typing import Any

import numpy as np
import traitlets

from ..analysis.state_maps import METRICS, StateMaps
from ..plots.figure import Figure
from ..plots.heat_map import hidden_state_map
from ..plots.visible_text import escaped
from .view import View, palette, source

_BARS = 48


class HiddenStateMap(View):
    """A map of hidden states: pointing at a cell shows its number; a click (or Enter) shows details of its state: a
    histogram, and the tokens with the most similar states.

    Args:
        maps: from `workbench.analysis.state_maps.state_maps`; `show` replaces them later.
        metric: the metric that the colours show, a key of `maps.values`.
        height: in pixels.

    Traits to link: `hovered`, the token under the pointer, or -1; `row`, the index of the tap whose numbers colour the
    other views; `chosen`, `[row, token]` of the cell whose details are shown, or empty. `stale`: the numbers belong to earlier
    ranges, and new ones are being computed.

    Raises:
        ValueError: `metric` is not a key of `METRICS`.
    """

    _esm = source("shared.js", "hidden_state_map.js")
    _css = source("views.css")

    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    taps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    spans = traitlets.List(traitlets.List(traitlets.Int())).tag(sync=True)
    values = traitlets.Bytes(b"").tag(sync=True)
    words: Any = traitlets.List().tag(sync=True)
    metrics = traitlets.Dict().tag(sync=True)
    metric = traitlets.Unicode("change").tag(sync=True)
    scale = traitlets.Unicode("log").tag(sync=True)
    bounds = traitlets.List(traitlets.Float(), default_value=[1e-3, 3.0]).tag(sync=True)
    palette = traitlets.Bytes(palette("magma_r")).tag(sync=True)
    unit = traitlets.Unicode("").tag(sync=True)
    worst = traitlets.Unicode("largest").tag(sync=True)
    failures = traitlets.List(traitlets.Int()).tag(sync=True)
    hovered = traitlets.Int(-1).tag(sync=True)
    row = traitlets.Int(-1).tag(sync=True)
    chosen = traitlets.List(traitlets.Int()).tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)
    stale = traitlets.Bool(False).tag(sync=True)
    height = traitlets.Int(330).tag(sync=True)

    def __init__(self, maps: StateMaps | None = None, metric: str = "change", height: int = 330) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: choose one of {', '.join(METRICS)}")
        self.maps = maps
        super().__init__(metric=metric, height=height)
        self._set_colour_scale()
        self.observe(lambda change: self._apply_metric(), "metric")
        self.observe(lambda change: self._open(), "chosen")
        if maps is not None:
            self.show(maps)

    def show(self, maps: StateMaps, wanted: dict[str, str] | None = None) -> None:
        """Show other maps; the selected metric is kept if it is in `maps` or in `wanted`.

        `wanted`: more metrics for the menu, `{name: title}`, that `maps` does not contain yet. If the user selects one,
        an observer of `metric` must compute it, add it to `maps.values` and call `refresh`.
        """
        self.maps = maps
        if self.metric not in maps.values and self.metric not in (wanted or {}):
            self.metric = next(iter(maps.values))
        with self.hold_sync():
            self.metrics = {name: METRICS[name].title for name in maps.values} | (wanted or {})
            self.tokens, self.taps = [escaped(token) for token in maps.tokens], list(maps.taps)
            self.spans = [list(pair) for pair in maps.ranges]
            if not -1 < self.row < len(maps.taps):
                self.row = len(maps.taps) - 1
            self.refresh()
        if self.values:
            self._open()

    def refresh(self) -> None:
        """Send the selected metric's numbers to the browser; if the maps do not contain it, show a message instead."""
        if self.maps is None or self.metric not in self.maps.values:
            self.clear(f"no numbers for {METRICS[self.metric].title} yet" if self.metric in METRICS else self.message)
            return
        with self.hold_sync():
            self.bounds = list(self.maps.bounds(self.metric))
            self.values = np.ascontiguousarray(self.maps.values[self.metric], np.float32).tobytes()
            self.words = [[escaped(word) for word in row] for row in self.maps.words]
            self.failures = self.maps.failures
            self.message = ""

    def clear(self, message: str) -> None:
        """Remove the numbers and show `message` instead."""
        with self.hold_sync():
            self.values, self.words, self.failures, self.detail, self.message = b"", [], [], {}, message

    def row_values(self) -> np.ndarray:
        """Return the selected metric's numbers at tap `row`, float32 `[tokens]`; empty if they are not computed."""
        if self.maps is None or self.metric not in self.maps.values or not 0 <= self.row < len(self.maps.taps):
            return np.zeros(0, np.float32)
        return self.maps.values[self.metric][self.row]

    def figure(self) -> Figure:
        if self.maps is None or self.metric not in self.maps.values:
            return Figure(figsize=(11, 1))
        maps = self.maps
        return hidden_state_map(
            maps.values[self.metric],
            maps.taps,
            maps.tokens,
            maps.ranges,
            self.metric,
            maps.bounds(self.metric),
            maps.failures,
        )

    def _apply_metric(self) -> None:
        if self.metric not in METRICS:  # set from code: the menu offers known metrics only
            self.clear(f"no metric {self.metric!r}: choose one of {', '.join(METRICS)}")
            return
        self._set_colour_scale()
        self.refresh()

    def _set_colour_scale(self) -> None:
        kind = METRICS[self.metric]
        with self.hold_sync():
            self.scale, self.palette, self.unit, self.worst = kind.scale, palette(kind.palette), kind.unit, kind.worst

    def _open(self) -> None:
        maps, at = self.maps, list(self.chosen)
        if maps is None or maps.row_states is None or len(at) != 2 or self.stale:
            self.detail = {}
            return
        row, token = at
        if not (0 <= row < len(maps.taps) and 0 <= token < len(maps.tokens)):
            self.detail = {}
            return
        state = maps.row_states(row)[token].double().numpy()
        finite = state[np.isfinite(state)]
        ends = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        margin = 1e-9 + 1e-6 * max(map(abs, ends))  # bars need a width above 0 even if all numbers are equal
        counts, edges = np.histogram(finite, bins=_BARS, range=(ends[0] - margin, ends[1] + margin))
        lines: list[list[str]] = [["nearest at this layer", "token", "cosine"]]
        for position, similarity in maps.neighbours(row, token):
            lines.append([_quoted(maps.tokens[position]), str(position), f"{similarity:.4f}"])
        if maps.words:
            lines.append(["reads as", _quoted(maps.words[row][token]), f"{maps.values['lens'][row, token]:.1%}"])
        self.detail = {
            "title": f"{maps.taps[row]}, token {token} {_quoted(maps.tokens[token])}: {len(state)} numbers, 2-norm "
            f"{np.linalg.norm(state):.4g}, largest {_largest(state)}",
            "size": len(state), "low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist(), "lines": lines,
        }  # fmt: skip


def _quoted(token: str) -> str:
    text = escaped(token)
    return repr(text if len(text) <= 32 else text[:31] + "…")


def _largest(state: Any) -> str:
    at = int(np.abs(np.nan_to_num(state)).argmax())
    return f"{state[at]:.4g} (channel {at})"
