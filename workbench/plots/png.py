"""A figure as PNG bytes, for a widget of fixed size."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Tokens come in every script; a character that the font lacks is drawn as a box, so no warning is needed.
warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes.

    It is rendered without pyplot, so it is not displayed by Jupyter and threads share no state.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas_png(canvas)


def canvas_png(canvas: FigureCanvasAgg) -> bytes:
    """Return a drawn canvas as PNG bytes, only lightly compressed, for speed."""
    buffer = BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "png", compress_level=2)
    return buffer.getvalue()
