"""A figure as PNG bytes, for a widget of fixed size."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Tokens are of every script; a letter that the font lacks is drawn as a box, which says enough.
warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)


def to_png(figure: Figure) -> bytes:
    """Render without touching pyplot, so that nothing is displayed twice and threads do not meet."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas_png(canvas)


def canvas_png(canvas: FigureCanvasAgg) -> bytes:
    """What is drawn on the canvas now. Light compression: it goes to a browser on the same machine or down a tunnel."""
    buffer = BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "png", compress_level=2)
    return buffer.getvalue()
