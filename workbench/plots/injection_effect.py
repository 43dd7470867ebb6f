"""A figure of an injection's effect: tokens, change and cosine by layer and position, likeliest next tokens."""

from __future__ import annotations

from typing import cast

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize

from ..analysis.injection_effect import InjectionEffect
from .figure import Figure
from .heat_map import draw_map, map_data
from .next_tokens import draw_next_tokens
from .png import canvas_png
from .style import mark_spans, mark_tokens, token_axis
from .tokens import draw_token_strip, mark_strip


class InjectionEffectFigure:
    """The figure of one prompt, 1100 x 620 pixels, for repeated drawing as its ranges move.

    Most of the drawing time goes into text that does not change, so labels are drawn once, and `png` redraws the rest
    over them. Effects must have the tokens and taps of the first one, given by `shape`. Not thread-safe.
    """

    def __init__(self, effect: InjectionEffect) -> None:
        self.shape = (tuple(effect.tokens), tuple(effect.taps))
        self.figure = Figure(figsize=(11, 6.2), dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        self.strip = self.figure.add_axes((0.045, 0.885, 0.945, 0.11))
        draw_token_strip(self.strip, effect.tokens)
        self.maps = {
            "change": self.figure.add_axes((0.06, 0.545, 0.70, 0.29)),
            "cosine": self.figure.add_axes((0.06, 0.165, 0.70, 0.29)),
        }
        self.images = {
            kind: draw_map(axes, getattr(effect, kind), effect.taps, kind) for kind, axes in self.maps.items()
        }
        self.maps["change"].set_xticks([])
        self.maps["change"].set_xlim(-0.5, len(effect.tokens) - 0.5)
        token_axis(self.maps["cosine"], effect.tokens)
        self.words = self.figure.add_axes((0.85, 0.165, 0.135, 0.67))
        self.marks: list[Artist] = []
        self.background = None

    def show(self, effect: InjectionEffect) -> None:
        """Change the figure to show another effect of the same prompt, without rendering it."""
        for mark in self.marks:
            mark.remove()
        for kind, image in self.images.items():
            image.set_data(map_data(getattr(effect, kind), kind, cast(Normalize, image.norm)))
        self.marks = [
            *mark_strip(self.strip, effect.tokens, effect.ranges),
            *(mark for axes in self.maps.values() for mark in mark_spans(axes, effect.ranges)),
            *mark_tokens(self.maps["cosine"], effect.tokens, effect.ranges),
        ]
        draw_next_tokens(self.words, effect.next_tokens, effect.without, effect.injected)

    def png(self, effect: InjectionEffect) -> bytes:
        """Show an effect and return the figure as PNG bytes."""
        if self.background is None:
            self.words.set_visible(False)
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(self.figure.bbox)
            self.words.set_visible(True)
        self.show(effect)
        self.canvas.restore_region(self.background)
        renderer = self.canvas.get_renderer()
        frames = [spine for axes in self.maps.values() for spine in axes.spines.values()]
        for artist in (*self.images.values(), *frames, *self.marks, self.words):
            artist.draw(renderer)
        return canvas_png(self.canvas)


def injection_effect_figure(effect: InjectionEffect) -> Figure:
    """Draw one effect as a new Figure, for papers."""
    drawn = InjectionEffectFigure(effect)
    drawn.show(effect)
    return drawn.figure
