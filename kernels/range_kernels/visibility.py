"""Which keys a query may see, as one half-open interval per query: `key_start[i] <= j < key_stop[i]`.

A causal prompt, bidirectional image spans, a sliding window, a chunk of a prefill and a decode step are all such
intervals, so two int32 per token replace the dense `[queries, keys]` mask.

Positions count from the start of a sequence's keys. If a sequence has more keys than queries (a chunk, a decode step),
the queries are its last positions, as in FlashAttention's `flash_attn_varlen_func`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

WindowRule = Literal["inside", "union"]


def visible_keys(
    length: int,
    bidirectional: Sequence[tuple[int, int]] = (),
    *,
    first: int = 0,
    window: int | None = None,
    window_rule: WindowRule = "inside",
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(key_start, key_stop)`, int32 arrays of length `length - first`, for one sequence of `length` keys.

    Args:
        length: number of keys, cached ones included.
        bidirectional: half-open spans `(start, stop)` inside which every token sees the whole span.
        first: position of the first query; the queries are positions `[first, length)`.
        window: a query at position p sees no key before `p - window + 1` (`window` counts p itself).
        window_rule: how a window applies to a bidirectional span. `"inside"` is Transformers' rule, `(causal or same
            span) and inside the window`; `"union"` is vLLM's default, `(causal and inside the window) or same span`.

    Raises:
        ValueError: a span is reversed, empty or outside `[0, length)`, two spans overlap, or a number is out of range.

    >>> key_start, key_stop = visible_keys(6, [(1, 4)])
    >>> key_stop.tolist()
    [1, 4, 4, 4, 5, 6]
    """
    if not 0 <= first <= length:
        raise ValueError(f"first={first} is outside the sequence of {length} keys: use 0 <= first <= length")
    if window is not None:
        if not isinstance(window, int | np.integer) or window < 1:
            raise ValueError(
                f"window={window}: use an integer of at least 1 (the token itself counts), or None for no window"
            )
        window = min(int(window), length + 1)
    if window_rule not in ("inside", "union"):
        raise ValueError(f"window_rule={window_rule!r}: use 'inside' (Transformers) or 'union' (vLLM)")
    position = np.arange(length, dtype=np.int32)
    key_stop = position + 1
    key_start = (
        np.zeros(length, dtype=np.int32) if window is None else np.maximum(position - window + 1, 0).astype(np.int32)
    )
    end_before = 0
    for number, (start, stop) in sorted(enumerate(bidirectional), key=lambda numbered: numbered[1]):
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"bidirectional span {number} is [{start}, {stop}): a span needs 0 <= start < stop <= {length}"
            )
        if start < end_before:
            raise ValueError(
                f"bidirectional span {number}, [{start}, {stop}), overlaps the previous span, which ends at {end_before}"
            )
        end_before = stop
        key_stop[start:stop] = stop
        if window is not None and window_rule == "union":
            key_start[start:stop] = np.minimum(key_start[start:stop], start)
    return key_start[first:], key_stop[first:]
