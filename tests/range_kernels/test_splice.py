"""CPU splice against the reference, and the arguments it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_kernels import SplicePlan, splice
from range_kernels.reference import splice as reference_splice

from tests.range_kernels.cases import DTYPES


@st.composite
def prompts(draw):
    length, vocab, hidden = draw(st.integers(1, 30)), 11, draw(st.sampled_from([1, 3, 8]))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    table = torch.randn(vocab, hidden, generator=generator).to(dtype)
    items = [torch.randn(stop - start, hidden, generator=generator).to(dtype) for start, stop in ranges]
    ids = torch.randint(vocab, (length,), generator=generator)
    return ids, table, items, ranges, sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))


@settings(deadline=None)
@given(prompts(), st.sampled_from([1.0, 4.0]))
def test_matches_the_reference_whole_and_in_chunks(prompt, scale):
    ids, table, items, ranges, (begin, end) = prompt
    expected = reference_splice(
        ids.numpy(), table.float().numpy(), [item.float().numpy() for item in items], ranges, scale=scale
    )
    assert np.array_equal(splice(ids, table, items, ranges, scale=scale).float().numpy(), expected)
    chunk = splice(ids[begin:end], table, items, ranges, offset=begin, scale=scale)
    assert np.array_equal(chunk.float().numpy(), expected[begin:end])


def test_ids_inside_ranges_are_never_looked_up():
    table = torch.randn(5, 4)
    out = splice([0, -200, 999, 1], table, [torch.ones(2, 4)], [(1, 3)])
    assert torch.equal(out, torch.stack([table[0], torch.ones(4), torch.ones(4), table[1]]))


def test_items_of_another_dtype_are_cast():
    out = splice([0, 0], torch.zeros(1, 2, dtype=torch.bfloat16), [torch.tensor([[1.001, 2.0]])], [(1, 2)])
    assert out.dtype == torch.bfloat16
    assert out[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0, 9], torch.zeros(5, 4)), r"input_ids\[1\] is 9, outside the table's vocabulary of 5"),
        (([0, 1], torch.zeros(5, 4), [torch.zeros(1, 4)], []), "1 items but 0 ranges"),
        (([0, 1], torch.zeros(5, 4), [torch.zeros(2, 4)], [(0, 1)]), "item 0"),
        (([0, 1], torch.zeros(5, 4), [torch.zeros(1, 3)], [(0, 1)]), "item 0"),
        (([0, 1], torch.zeros(5, 4), [torch.zeros(1, 4)] * 2, [(1, 2), (0, 1)]), "range 1"),
        (([0, 1], torch.zeros(5, 4), [torch.zeros(0, 4)], [(1, 1)]), "not empty"),
        (([0, 1], torch.zeros(5, 4).T, [], []), "contiguous"),
        (([0, 1], torch.zeros(5, 4).double(), [], []), "float64"),
        (([[0, 1]], torch.zeros(5, 4), [], []), "one packed"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        splice(*arguments)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([-1, 0], r"input_ids\[0\] is -1"),
        ([0, -(2**31)], r"input_ids\[1\] is -2147483648"),
        (torch.tensor([2**32 + 1, 0]), r"input_ids\[0\] is 4294967297"),
        (torch.tensor([1.9, 0.0]), "token ids are integers"),
        (torch.tensor([True, False]), "token ids are integers"),
    ],
)
def test_ids_outside_the_table_or_not_integers_are_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        splice(ids, torch.randn(5, 4), [torch.zeros(0, 4)][:0], [])


def test_plan_equals_its_items_and_ranges_and_refuses_others():
    table, item = torch.randn(5, 4), torch.ones(2, 4)
    plan = SplicePlan([item], [(4, 6)], table, 3, offset=3)
    assert torch.equal(splice([1, 2, 3], table, plan=plan), splice([1, 2, 3], table, [item], [(4, 6)], offset=3))
    item.fill_(7.0)  # rows are read when splice is called
    assert (splice([1, 2, 3], table, plan=plan)[1:] == 7.0).all()
    with pytest.raises(ValueError, match="leave them out"):
        splice([1, 2, 3], table, [item], [(4, 6)], plan=plan)
    with pytest.raises(ValueError, match="2 input_ids, but the plan is for 3"):
        splice([1, 2], table, plan=plan)
    with pytest.raises(ValueError, match=r"table is torch.float16 of width 4 on cpu, the plan for torch.float32"):
        splice([1, 2, 3], table.half(), plan=plan)
    with pytest.raises(ValueError, match="item 0"):
        SplicePlan([item], [(4, 7)], table, 3)
