"""A view of images with the patches that the vision tower turns into tokens, one feature row and token each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from typing import Any

import numpy as np
import traitlets
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from PIL import Image

from ..analysis.state_maps import METRICS
from ..plots.figure import Figure
from ..plots.heat_map import NOT_FINITE
from ..plots.patches import PatchGrid, grids_figure
from ..plots.visible_text import drawable, escaped, label
from ..prompt import Prompt, Span
from ..vision.images import open_image
from ..vision.videos import Video
from .view import View, palette, source

_MAX_SIDE = 512  # pixels; larger images are scaled down before they are sent to the browser
_LINE = 64  # cells in a line of an item without a grid
_STORED = 12  # items in the stored image


class PatchView(View):
    """Images with patch grids: pointing at a patch shows its token. Patches can be coloured by one number per token.

    The grid of an item is that of its span, with one grid per frame for M-RoPE's (time, height, width). An item whose
    span has no grid of as many cells as it has rows, such as audio, is drawn in reading order in lines of up to 64 cells.
    With many items the view has pages of 12. A video is a strip of its frames, one for each step of time that has rows.

    Args:
        prompt: its embedding ranges give the positions of the rows.
        images: one image or `Video` per item, in order, as the vision tower received it; None for an item without a picture. An item whose
            spans are parts ("video 0, part 2 of 3") is one item here.
        width: width of each image, in pixels.

    Traits to link: `hovered`, the token under the pointer, or -1.
    """

    _esm = source("shared.js", "patch_view.js")
    _css = source("views.css")

    items = traitlets.List(traitlets.Dict()).tag(sync=True)
    images = traitlets.List(traitlets.Bytes()).tag(sync=True)
    values = traitlets.Bytes(b"").tag(sync=True)
    bounds = traitlets.List(traitlets.Float(), default_value=[0.0, 0.0]).tag(sync=True)
    palette = traitlets.Bytes(palette("magma_r")).tag(sync=True)
    scale = traitlets.Unicode("log").tag(sync=True)
    opacity = traitlets.Float(0.55).tag(sync=True)
    hovered = traitlets.Int(-1).tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    width = traitlets.Int(280).tag(sync=True)

    def __init__(self, prompt: Prompt, images: Sequence[Image.Image | Video | None] = (), width: int = 280) -> None:
        # For each item the number of its first picture, and how many it has.
        self._pictures: list[tuple[int, int]] = []
        self._png: list[bytes] = []
        owners = _owners(prompt, len(images))
        steps = Counter[int | None]()
        for owner, count in zip(owners, _steps_of_time(prompt), strict=True):
            steps[owner] += count
        for number, image in enumerate(images):
            count = steps[number]
            shown = _frames(image, count) if isinstance(image, Video) else [image and open_image(image)]
            self._pictures.append((len(self._png), len(shown)))
            self._png += [_png(each) for each in shown]
        super().__init__(width=width, images=self._png, items=self._items(prompt))
        self.prompt = prompt

    def show(self, prompt: Prompt) -> None:
        """Show another prompt with the same images, such as one whose ranges have moved."""
        self.prompt = prompt
        items = self._items(prompt)
        if _geometries(items) != _geometries(self.items):
            self.items = items

    def colour(
        self, values: np.ndarray, metric: str, bounds: tuple[float, float], caption: str = "", scale: str | None = None
    ) -> None:
        """Colour the patches by `values` `[tokens]`, one number per token of the prompt, in the colours of a metric.

        Args:
            metric: a key of `METRICS`, whose palette is used.
            bounds: ends of the colour scale.
            caption: shown while the pointer is not at a patch.
            scale: "log" or "linear"; None is the metric's own.
        """
        kind = METRICS[metric]
        with self.hold_sync():
            self.bounds, self.scale, self.palette = list(bounds), scale or kind.scale, palette(kind.palette)
            self.values, self.caption = np.ascontiguousarray(values, np.float32).tobytes(), caption

    def clear(self) -> None:
        """Remove the colours."""
        with self.hold_sync():
            self.values, self.caption = b"", ""

    def figure(self) -> Figure:
        """Return the images with their grids, current colours and token ranges as a matplotlib figure."""
        return self._figure(self.items)

    def snapshot(self) -> Figure:
        return self._figure(self.items[:_STORED])

    def _figure(self, items: Sequence[dict[str, Any]]) -> Figure:
        values, (low, high) = np.frombuffer(self.values, np.float32), self.bounds
        logarithmic = self.scale == "log"
        if low >= high or (logarithmic and low <= 0):  # no valid colour scale: draw without colours
            values, logarithmic = values[:0], False
        if logarithmic:
            values = np.where((values > 0) | np.isinf(values), values, np.nan)
        grids = []
        for item in items:
            lines, columns, start = item["lines"], item["columns"], item["start"]
            stop = start + item["rows"]
            image = Image.open(BytesIO(self._png[item["image"]])) if item["image"] >= 0 else None
            numbers = None
            if start >= 0 and stop <= len(values):
                numbers = np.full(lines * columns, np.nan, np.float32)
                numbers[: stop - start] = values[start:stop]
                numbers = numbers.reshape(lines, columns)
            title = f"{drawable(label(item['label'], 40))}: tokens [{start}, {stop})"
            grids.append(PatchGrid(title, lines, columns, image, numbers))
        left_out = len(self.items) - len(items)
        caption = self.caption + (f"; {left_out} more items are not drawn" if left_out else "")
        norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
        colours = ListedColormap(np.frombuffer(self.palette, np.uint8).reshape(-1, 3) / 255).with_extremes(
            over=NOT_FINITE
        )
        return grids_figure(grids, norm, colours, self.opacity, drawable(caption))

    def _items(self, prompt: Prompt) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        owners = _owners(prompt, len(self._pictures))
        parts, passed = Counter(owners), Counter[int | None]()
        steps = _steps_of_time(prompt)
        for number, (start, stop) in enumerate(prompt.embedding_ranges):
            span = prompt.spans[number] if number < len(prompt.spans) else None
            name = escaped((span.label or f"{span.modality} {number}") if span else f"item {number}")[:200]
            owner = owners[number]
            first_step = passed[owner]
            passed[owner] += steps[number]  # also for a range without rows, so that later parts keep their frames
            start, stop = max(start, 0), min(stop, len(prompt))  # ranges may be invalid, and endless
            rows = stop - start
            if rows < 1:
                continue
            grid = _grid(span, rows)
            first, count = self._pictures[owner] if grid is not None and owner is not None else (0, 0)
            frames = 1 if grid is None else int(np.prod(grid[:-2]))
            lines, columns = (-(-rows // _LINE), min(rows, _LINE)) if grid is None else grid[-2:]
            for frame in range(frames):
                geometry = {
                    "start": start + frame * lines * columns,
                    "rows": rows // frames,
                    "lines": lines,
                    "columns": columns,
                }
                shown = name if frames == 1 else f"{name}, frame {frame}"
                # An image has one picture for all its grids; parts of an image, such as tiles, have none.
                step = first_step + frame
                shows = step < count if count > 1 else count == 1 and parts[owner] == 1
                image = first + (step if count > 1 else 0) if shows else -1
                found.append(
                    {
                        "label": shown,
                        "range": number,
                        "image": image if image >= 0 and self._png[image] else -1,
                        **geometry,
                    }
                )
        return found


def _owners(prompt: Prompt, count: int) -> list[int | None]:
    """For each range the item that it belongs to, of `count`: its own number, or one for all parts of an item."""
    spans = [
        prompt.spans[number] if number < len(prompt.spans) else None for number in range(len(prompt.embedding_ranges))
    ]
    continues = [span is not None and re.search(r", part (?!1 )\d+ of \d+$", span.label) is not None for span in spans]
    whole = [begun - 1 for begun in accumulate(int(not each) for each in continues)]
    owners = whole if any(continues) and max(whole, default=-1) + 1 == count else range(len(continues))
    return [owner if 0 <= owner < count else None for owner in owners]


def _steps_of_time(prompt: Prompt) -> list[int]:
    """For each range the number of grids of its span, 1 without a grid."""
    grids = [span.grid or () for span in prompt.spans[: len(prompt.embedding_ranges)]]
    counts = [int(np.prod(grid[:-2])) if len(grid) >= 2 else 1 for grid in grids]
    return counts + [1] * (len(prompt.embedding_ranges) - len(counts))


def _frames(video: Video, count: int) -> list[Image.Image | None]:
    """`count` frames of a video at equal distances; none if it has more frames than its rows tell apart, as after pooling over time."""
    total = len(video.frames)
    if total < count or (count < 2 and total > 1):
        return [None]
    return [Image.fromarray(video.frames[number * total // count]) for number in range(count)]


def _grid(span: Span | None, rows: int) -> tuple[int, ...] | None:
    """The span's grid if it has at least two dimensions and exactly one cell per row, else None."""
    grid = tuple(span.grid) if span is not None and span.grid else ()
    fits = len(grid) >= 2 and all(side > 0 for side in grid) and int(np.prod(grid)) == rows
    return grid if fits else None


def _geometries(items: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(item["label"], item["start"], item["rows"], item["lines"], item["columns"]) for item in items]


def _png(image: Image.Image | None) -> bytes:
    if image is None:
        return b""
    small = image.copy()
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = BytesIO()
    small.convert("RGB").save(buffer, "png")
    return buffer.getvalue()
