"""`visible_keys` against the dense masks it replaces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from range_kernels import visible_keys


@st.composite
def sequences(draw):
    length = draw(st.integers(1, 40))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
    spans = [pair for pair in zip(cuts[::2], cuts[1::2], strict=False) if draw(st.booleans())]
    return length, spans, draw(st.none() | st.integers(1, 12)), draw(st.integers(0, length))


@given(sequences(), st.sampled_from(["inside", "union"]))
def test_intervals_equal_the_dense_mask(sequence, rule):
    length, spans, window, first = sequence
    query, key = np.mgrid[:length, :length]
    causal = key <= query
    same_span = np.zeros_like(causal)
    for start, stop in spans:
        same_span[start:stop, start:stop] = True
    inside = np.ones_like(causal) if window is None else key > query - window
    dense = (causal | same_span) & inside if rule == "inside" else (causal & inside) | same_span
    key_start, key_stop = visible_keys(length, spans, first=first, window=window, window_rule=rule)
    assert key_start.dtype == key_stop.dtype == np.int32
    assert np.array_equal((key_start[:, None] <= key[first:]) & (key[first:] < key_stop[:, None]), dense[first:])


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(3, 2)], "span 0 is [3, 2)"),
        ([(0, 2), (5, 11)], "span 1 is [5, 11)"),
        ([(0, 4), (3, 6)], "overlaps"),
        ([(2, 2)], "start < stop"),
    ],
)
def test_invalid_spans_are_refused_by_name(spans, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace(")", r"\)")):
        visible_keys(10, spans)


@pytest.mark.parametrize("arguments", [{"window": 0}, {"first": 11}, {"first": -1}, {"window_rule": "both"}])
def test_invalid_numbers_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        visible_keys(10, **arguments)
