"""Splice on the CPU: one parallel pass over tokens, copying whole rows."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True)
def row_sources(input_ids, plan, vocab, source):
    """Fill `source` [tokens] with a packed row number, or -1 - id for a table row. Return the first token whose id is
    outside `[0, vocab)`, or -1."""
    for token in range(len(input_ids)):
        source[token] = -1
    for number in range(len(plan)):
        start, stop, first_row = plan[number, 0], plan[number, 1], plan[number, 2]
        for token in range(start, stop):
            source[token] = first_row + token - start
    for token in range(len(input_ids)):
        if source[token] < 0:
            if not 0 <= input_ids[token] < vocab:
                return token
            source[token] = -1 - np.int64(input_ids[token])
    return -1


@njit(parallel=True, cache=True)
def copy_rows(source, table, rows, out):
    """`table` [vocab, hidden], `rows` [packed, hidden], `out` [tokens, hidden]: any one element type."""
    for token in prange(len(source)):
        if source[token] >= 0:
            out[token] = rows[source[token]]
        else:
            out[token] = table[-1 - source[token]]
