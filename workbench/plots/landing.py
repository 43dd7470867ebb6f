"""Where an injection lands: token strip, change and cosine by layer and position, and the next word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .maps import draw_map, map_data
from .png import canvas_png
from .style import mark_spans, mark_tokens, token_axis
from .tokens import draw_token_strip, mark_strip
from .words import draw_next_words


@dataclass(frozen=True)
class Landing:
    """What the picture shows, computed elsewhere.

    Attributes:
        change, cosine: `[taps, positions]`, the injected run against the plain one.
        words: next words; plain, injected: their probabilities.
    """

    tokens: Sequence[str]
    ranges: Sequence[tuple[int, int]]
    taps: Sequence[str]
    change: np.ndarray
    cosine: np.ndarray
    words: Sequence[str]
    plain: Sequence[float]
    injected: Sequence[float]


class LandingPicture:
    """The picture of one prompt, 1100 x 620 pixels; `png` redraws only what an injection changes.

    Most of the time of a drawing goes into text that stays: labels are drawn once and kept as a background.
    """

    def __init__(self, landing: Landing) -> None:
        self.shape = (tuple(landing.tokens), tuple(landing.taps))
        self.figure = Figure(figsize=(11, 6.2), dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        self.strip = self.figure.add_axes((0.045, 0.885, 0.945, 0.11))
        draw_token_strip(self.strip, landing.tokens)
        self.maps = {
            "change": self.figure.add_axes((0.06, 0.545, 0.70, 0.29)),
            "cosine": self.figure.add_axes((0.06, 0.165, 0.70, 0.29)),
        }
        self.images = {
            kind: draw_map(axes, getattr(landing, kind), landing.taps, kind) for kind, axes in self.maps.items()
        }
        self.maps["change"].set_xticks([])
        token_axis(self.maps["cosine"], landing.tokens)
        self.words = self.figure.add_axes((0.85, 0.165, 0.135, 0.67))
        self.marks: list[Artist] = []
        self.background = None

    def show(self, landing: Landing) -> None:
        """Put an injection into the figure."""
        for mark in self.marks:
            mark.remove()
        for kind, image in self.images.items():
            image.set_data(map_data(getattr(landing, kind), kind))
        self.marks = [
            *mark_strip(self.strip, landing.tokens, landing.ranges),
            *(mark for axes in self.maps.values() for mark in mark_spans(axes, landing.ranges)),
            *mark_tokens(self.maps["cosine"], landing.tokens, landing.ranges),
        ]
        draw_next_words(self.words, landing.words, landing.plain, landing.injected)

    def png(self, landing: Landing) -> bytes:
        """Redraw the moving parts over the kept background."""
        if self.background is None:
            self.words.set_visible(False)
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(self.figure.bbox)
            self.words.set_visible(True)
        self.show(landing)
        self.canvas.restore_region(self.background)
        renderer = self.canvas.get_renderer()
        frames = [spine for axes in self.maps.values() for spine in axes.spines.values()]
        for artist in (*self.images.values(), *frames, *self.marks, self.words):
            artist.draw(renderer)
        return canvas_png(self.canvas)


def landing_figure(landing: Landing) -> Figure:
    """The picture as a figure of its own, for papers."""
    picture = LandingPicture(landing)
    picture.show(landing)
    return picture.figure
