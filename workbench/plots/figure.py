"""A matplotlib figure that a notebook shows without `%matplotlib inline`."""

from __future__ import annotations

from matplotlib import figure

from .png import to_png


class Figure(figure.Figure):
    """Matplotlib's figure, without pyplot, which a notebook displays if it is the last expression of a cell."""

    def _repr_png_(self) -> bytes:
        return to_png(self)
