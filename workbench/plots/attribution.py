"""Draw what an answer takes from the rows of a prompt, on the grids of its items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from PIL import Image

from .figure import Figure
from .patches import PatchGrid, grids_figure

if TYPE_CHECKING:
    from ..analysis.attribution import Attribution

_LINE = 64  # cells in a line of an item without a grid


def attribution_figure(attribution: Attribution, images: Sequence[Image.Image] = ()) -> Figure:
    """Draw the change per row in nats, red where the answer loses and blue where it gains; changes below twice the noise are uncoloured.

    Args:
        images: one per item, in order, drawn behind its grid; fewer, or none, leave grids empty.
    """
    values = [
        np.where(attribution.significant(number), attribution.rows(number), np.nan)
        for number in range(len(attribution.items))
    ]
    largest = max((float(np.nanmax(np.abs(each))) for each in values if np.isfinite(each).any()), default=1.0)
    grids: list[PatchGrid] = []
    for number, each in enumerate(values):
        span = attribution.prompt.spans[number] if attribution.prompt.spans else None
        title = f"{(span.label if span else '') or f'item {number}'}: without it {-attribution.items[number]:+.2f} nats"
        for part, (frame, lines, columns) in enumerate(_frames(each, span.grid if span else None)):
            image = images[number] if number < len(images) and not part else None
            grids.append(PatchGrid(title if not part else f"frame {part}", lines, columns, image, frame))
    state = "" if attribution.complete else "; the run was stopped early"
    caption = f"nats per row that {attribution.text!r} takes{state}\nuncoloured: within {2 * attribution.noise:.2g}, the noise"
    return grids_figure(grids, Normalize(-largest, largest), matplotlib.colormaps["RdBu_r"], caption=caption)


def _frames(values: np.ndarray, grid: Sequence[int] | None) -> list[tuple[np.ndarray, int, int]]:
    """The rows as one or several grids: values `[lines, columns]`, lines, columns."""
    if grid and int(np.prod(grid)) == len(values):
        lines, columns = grid[-2:] if len(grid) > 1 else (1, grid[0])
        return [(frame, lines, columns) for frame in values.reshape(-1, lines, columns)]
    columns = min(_LINE, len(values))
    lines = -(-len(values) // columns)
    padded = np.full(lines * columns, np.nan)
    padded[: len(values)] = values
    return [(padded.reshape(lines, columns), lines, columns)]
