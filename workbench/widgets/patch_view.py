"""Pictures with their patches, in the browser: a patch is a row of features, a row is a token."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import traitlets
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

from ..plots.patches import PatchGrid, grids_figure
from ..plots.style import visible
from ..prompt import Prompt, Span
from ..state_maps import METRICS
from ..vision.images import open_image
from .view import View, palette, source

_WIDEST = 512  # pixels of a picture that is sent


class PatchView(View):
    """Point at a patch to see which token it is; patches may be coloured by a number for each token.

    Grids come from the prompt's spans: any size, several pictures, M-RoPE's (time, height, width), a frame a picture. Items without a
    grid of their size, sounds among them, are strips of time.

    Args:
        prompt: whose ranges say where rows stand now.
        pictures: of the items in order, as the tower saw them; None for an item that has none.
        width: of each picture, in pixels.
    """

    _esm = source("shared.js", "patch_view.js")
    _css = source("views.css")

    items = traitlets.List(traitlets.Dict()).tag(sync=True)
    pictures = traitlets.List(traitlets.Bytes()).tag(sync=True)
    values = traitlets.Bytes(b"").tag(sync=True)
    bounds = traitlets.List(traitlets.Float(), default_value=[0.0, 0.0]).tag(sync=True)
    palette = traitlets.Bytes(palette("magma_r")).tag(sync=True)
    scale = traitlets.Unicode("log").tag(sync=True)
    opacity = traitlets.Float(0.55).tag(sync=True)
    hovered = traitlets.Int(-1).tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    width = traitlets.Int(280).tag(sync=True)

    def __init__(self, prompt: Prompt, pictures: Sequence[Image.Image | None] = (), width: int = 280) -> None:
        self._pictures = [None if picture is None else open_image(picture) for picture in pictures]
        self._png = [_png(picture) for picture in self._pictures]
        super().__init__(width=width, pictures=self._png, items=self._items(prompt))
        self.prompt = prompt

    def show(self, prompt: Prompt) -> None:
        """Take ranges that have moved."""
        self.prompt = prompt
        items = self._items(prompt)
        if _places(items) != _places(self.items):
            self.items = items

    def colour(
        self, values: np.ndarray, metric: str, bounds: tuple[float, float], caption: str = "", scale: str | None = None
    ) -> None:
        """Colour patches by a number for each token of the prompt, `[tokens]`, as the map colours that metric.

        `scale`: "log" or "linear", where not the metric's own.
        """
        kind = METRICS[metric]
        with self.hold_sync():
            self.bounds, self.scale, self.palette = list(bounds), scale or kind.scale, palette(kind.palette)
            self.values, self.caption = np.ascontiguousarray(values, np.float32).tobytes(), caption

    def clear(self) -> None:
        """No colours."""
        with self.hold_sync():
            self.values, self.caption = b"", ""

    def figure(self) -> Figure:
        """The pictures with their grids, coloured as they are now, and where their rows stand."""
        values, (low, high) = np.frombuffer(self.values, np.float32), self.bounds
        logarithmic = self.scale == "log"
        if low >= high or (logarithmic and low <= 0):  # nothing is painted in the browser either
            values, logarithmic = values[:0], False
        if logarithmic:
            values = np.where(values > 0, values, np.nan)
        grids = []
        for item in self.items:
            lines, columns, start = item["lines"], item["columns"], item["start"]
            stop = start + item["rows"]
            picture = Image.open(BytesIO(self._png[item["picture"]])) if item["picture"] >= 0 else None
            numbers = values[start:stop].reshape(lines, columns) if start >= 0 and stop <= len(values) else None
            title = f"{visible(item['label'])}: tokens [{start}, {stop})"
            grids.append(PatchGrid(title, lines, columns, picture, numbers))
        norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
        colours = ListedColormap(np.frombuffer(self.palette, np.uint8).reshape(-1, 3) / 255)
        return grids_figure(grids, norm, colours, self.opacity, self.caption)

    def _items(self, prompt: Prompt) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, (start, stop) in enumerate(prompt.embedding_ranges):
            span = prompt.spans[number] if number < len(prompt.spans) else None
            label = (span.label or f"{span.modality} {number}") if span else f"item {number}"
            rows = stop - start
            if rows < 1:
                continue
            grid = _grid(span, rows)
            picture = number if grid is not None and number < len(self._png) and self._png[number] else -1
            frames, (lines, columns) = (1, (1, rows)) if grid is None else (int(np.prod(grid[:-2])), grid[-2:])
            for frame in range(frames):
                name = label if frames == 1 else f"{label}, frame {frame}"
                place = {
                    "start": start + frame * lines * columns,
                    "rows": lines * columns,
                    "lines": lines,
                    "columns": columns,
                }
                found.append({"label": name, "range": number, "picture": picture, **place})
        return found


def _grid(span: Span | None, rows: int) -> tuple[int, ...] | None:
    """A span's grid where its rows fill one."""
    grid = tuple(span.grid) if span is not None and span.grid else ()
    fits = len(grid) >= 2 and all(side > 0 for side in grid) and int(np.prod(grid)) == rows
    return grid if fits else None


def _places(items: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(item["label"], item["start"], item["lines"], item["columns"]) for item in items]


def _png(picture: Image.Image | None) -> bytes:
    if picture is None:
        return b""
    small = picture.copy()
    small.thumbnail((_WIDEST, _WIDEST))
    buffer = BytesIO()
    small.convert("RGB").save(buffer, "png")
    return buffer.getvalue()
