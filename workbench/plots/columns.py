"""Columns of a picture that stand for several tokens each: the worst of them is drawn, so that no single wrong token is hidden."""

from __future__ import annotations

import numpy as np

MOST_COLUMNS = 600
"""Columns of a figure 1,100 pixels wide whose axes leave room for labels and a colour bar: each is at least one pixel."""


def tokens_per_column(tokens: int, columns: int = MOST_COLUMNS) -> int:
    """How many tokens share a column if at most `columns` are drawn; at least 1."""
    return max(-(-tokens // columns), 1)


def worst_per_column(values: np.ndarray, per_column: int, lowest: bool = False) -> np.ndarray:
    """Reduce `[rows, tokens]` to `[rows, ceil(tokens / per_column)]`: the largest, or lowest, number of each column's tokens.

    NaN, a number that is missing, counts only if all tokens of a column have it.
    """
    if per_column == 1:
        return values
    rows, tokens = values.shape
    columns = -(-tokens // per_column)
    padded = np.full((rows, columns * per_column), np.nan, values.dtype)
    padded[:, :tokens] = values
    # fmax and fmin ignore NaN.
    return (np.fmin if lowest else np.fmax).reduce(padded.reshape(rows, columns, per_column), axis=2)


def column_extent(rows: int, tokens: int, per_column: int) -> tuple[float, float, float, float]:
    """Matplotlib's `extent` of an image of columns, so that x stays the token and y the row; the last column may be partly empty."""
    return (-0.5, -(-tokens // per_column) * per_column - 0.5, -0.5, rows - 0.5)


def columns_note(per_column: int, lowest: bool = False) -> str:
    """The words that say what a column shows; empty if it is one token."""
    return (
        "" if per_column == 1 else f"; {per_column} tokens per column: the {'lowest' if lowest else 'largest'} is drawn"
    )
