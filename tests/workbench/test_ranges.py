"""Ranges: every fault is reported; clip, shift and pack agree with their effect on tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.prompt.checks import range_findings
from workbench.prompt.ranges import clip, pack, shift


@pytest.mark.parametrize(
    ("ranges", "rows", "codes"),
    [
        ([(0, 2), (2, 5)], [2, 3], []),
        ([(2, 5), (0, 2)], [3, 2], ["range-order"]),
        ([(0, 3), (2, 5)], [3, 3], ["range-overlap"]),
        ([(1, 4), (1, 4)], [3, 3], ["range-overlap"]),
        ([(5, 2)], [3], ["range-reversed"]),
        ([(3, 3)], [0], ["range-empty"]),
        ([(-1, 2)], [3], ["range-bounds"]),
        ([(8, 11)], [3], ["range-bounds"]),
        ([(0, 2)], [3], ["row-count"]),
        ([(0, 2)], [1], ["row-count"]),
        ([(0, 2)], [2, 2], ["item-count"]),
        ([(0, 2), (4, 3), (8, 12)], [1, 1, 4], ["row-count", "range-reversed", "range-bounds"]),
    ],
)
def test_range_faults_are_reported_by_code(ranges, rows, codes):
    assert [fault.code for fault in range_findings(ranges, 10, rows)] == codes


def test_message_contains_item_ranges_and_fix():
    (fault,) = range_findings([(0, 3), (2, 5)], 10, [3, 3])
    assert fault.item == 1
    assert "embedding_ranges[1] = [2, 5) overlaps embedding_ranges[0] = [0, 3) by 1 tokens" in fault.message
    assert "start it at 3 or later" in fault.message


@st.composite
def valid_ranges(draw):
    length = draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=8)))
    return length, list(zip(cuts[::2], cuts[1::2], strict=False))


def tokens_of(ranges):
    return {(item, position) for item, (start, stop) in enumerate(ranges) for position in range(start, stop)}


@given(valid_ranges(), st.integers(0, 30), st.integers(0, 30))
def test_clip_keeps_exactly_the_tokens_of_the_chunk(prompt, start, stop):
    _, ranges = prompt
    kept = {(item, p) for item, (a, b) in clip(ranges, start, stop) for p in range(a, b)}
    assert kept == {(item, p) for item, p in tokens_of(ranges) if start <= p < stop}


@given(st.lists(valid_ranges(), min_size=1, max_size=4))
def test_packed_ranges_are_valid_and_shifted_by_prompt_offsets(prompts):
    cumulative, packed = pack([length for length, _ in prompts], [ranges for _, ranges in prompts])
    assert not list(range_findings(packed, cumulative[-1]))
    back = [pair for (_, ranges), at in zip(prompts, cumulative, strict=False) for pair in shift(ranges, at)]
    assert packed == back
