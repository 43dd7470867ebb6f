"""Properties of batch plans for random prompts, and packed runs compared with single runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench
from tests.workbench.small_models import save_llama
from workbench import Prompt, Span
from workbench.plots.packing import plan_figure
from workbench.prompt.packing import plan_batch


def prompt_of(length, ranges, attention="bidirectional", width=48):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 97, (length,), generator=generator)
    rows = [torch.randn(stop - start, width, generator=generator) * 0.1 for start, stop in ranges]
    return Prompt(ids, rows, ranges, [Span(attention=attention)] * len(ranges))


@st.composite
def prompts(draw):
    made = []
    for _ in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, 90))
        edges = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        ranges = [(a, min(b, a + 20)) for a, b in zip(edges[::2], edges[1::2], strict=False)]
        made.append(prompt_of(length, ranges, draw(st.sampled_from(("causal", "bidirectional")))))
    return made


@settings(deadline=None, max_examples=150)
@given(prompts(), st.integers(20, 120), st.booleans())
def test_every_token_runs_once_in_order_and_no_span_is_cut(made, budget, split):
    if not split:
        budget = max(budget, *(len(prompt) for prompt in made))
    plan = plan_batch(made, budget, split=split)
    done = [0] * len(made)
    for batch in plan.batches:
        assert 0 < sum(map(len, batch)) <= budget
        assert len({chunk.prompt for chunk in batch}) == len(batch)
        for chunk in batch:
            assert chunk.start == done[chunk.prompt]
            done[chunk.prompt] = chunk.stop
            for start, stop in made[chunk.prompt].bidirectional_ranges:
                assert chunk.stop <= start or chunk.stop >= stop
    assert done == [len(prompt) for prompt in made]
    if split and not any(prompt.bidirectional_ranges for prompt in made):
        assert len(plan.batches) == -(-sum(done) // budget)  # no space is lost if every prompt may be cut


def test_a_bidirectional_range_longer_than_a_batch_is_refused():
    with pytest.raises(
        workbench.PromptError,
        match=r"prompt 1: the bidirectional range \[5, 35\) has 30 tokens.*a batch of 20: raise max_tokens to 30",
    ):
        plan_batch([prompt_of(10, []), prompt_of(50, [(5, 35)])], 20)
    with pytest.raises(workbench.PromptError, match="it has 50 tokens"):
        plan_batch([prompt_of(50, [(5, 35)])], 40, split=False)
    with pytest.raises(ValueError, match="max_tokens=0"):
        plan_batch([prompt_of(3, [])], 0)
    with pytest.raises(workbench.PromptError, match="no prompts"):
        plan_batch([], 10)


def test_plan_summary_reports_padding_and_fill():
    plan = plan_batch([prompt_of(30, []), prompt_of(10, [])], 25)
    assert (
        str(plan).splitlines()[-1]
        == "40 tokens in 2 batches, no padding; one padded batch would compute 60, 33% of them padding"
    )
    assert plan.padding == 20
    assert plan.fill == [1.0, 0.6]


@pytest.mark.parametrize("budget", [33, 64, 500])
def test_packed_runs_equal_single_runs(budget, tmp_path):
    engine = workbench.open_engine("numba", save_llama(tmp_path))
    made = [
        prompt_of(40, [(3, 12), (20, 29)]),
        prompt_of(7, []),
        prompt_of(64, [(30, 60)]),
        prompt_of(33, [(0, 9)], "causal"),
        prompt_of(1, []),
    ]
    together = engine.prefill_packed(made, budget)
    for prompt, state in zip(made, together, strict=True):
        torch.testing.assert_close(state, engine.trace(prompt, ["norm"], [-1])["norm"][0], rtol=1e-5, atol=1e-6)


def test_batch_with_an_invalid_prompt_is_refused(tmp_path):
    engine = workbench.open_engine("numba", save_llama(tmp_path))
    bad = prompt_of(10, [(2, 5)]).replace(embedding_ranges=[(2, 50)])
    with pytest.raises(workbench.EmbeddingRangeError, match="leaves the prompt of 10 tokens"):
        engine.prefill_packed([prompt_of(8, []), bad])


def test_plan_figure_shows_every_range():
    made = [prompt_of(30, [(5, 10)]), prompt_of(10, [(2, 4), (6, 8)])]
    figure = plan_figure(plan_batch(made, 25), made)
    red = [
        patch
        for axes in figure.axes
        for patch in axes.patches
        if patch.get_facecolor()[:3] == (209 / 255, 73 / 255, 91 / 255)
    ]
    assert sum(patch.get_width() for patch in red) == 2 * sum(
        stop - start for prompt in made for start, stop in prompt.embedding_ranges
    )


def test_overlapping_blocks_run_together_or_are_refused():
    rows = [torch.zeros(2, 4)] * 2
    blocks = [Span("image", None, "bidirectional", "", block) for block in ((0, 5), (3, 9))]
    prompt = Prompt(range(10), rows, [(1, 3), (5, 7)], blocks)
    with pytest.raises(workbench.PromptError, match=r"\[0, 9\) has 9 tokens"):
        plan_batch([prompt], 7)
    assert len(plan_batch([prompt], 9).batches) == 2
