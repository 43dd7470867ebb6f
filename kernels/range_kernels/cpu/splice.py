"""Splice on the CPU: one parallel pass over tokens, copying whole rows."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True)
def row_sources(input_ids, plan, vocab, source):
    """Fill `source` [tokens], for `copy_rows`: the index of a packed row for tokens inside a range, else -1 - id.

    `plan` is that of `clipping.pack_rows`. Returns the first token outside all ranges whose id is not in `[0, vocab)`,
    or -1 if there is none; with such a token `source` is not complete.
    """
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
    """Fill `out` [tokens, hidden] with rows of `table` [vocab, hidden] and `rows` [packed, hidden].

    `source`, from `row_sources`, selects the row of each token. All three have the same element type.
    """
    for token in prange(len(source)):
        if source[token] >= 0:
            out[token] = rows[source[token]]
        else:
            out[token] = table[-1 - source[token]]
