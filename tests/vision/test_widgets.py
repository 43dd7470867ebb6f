"""Explorer and packing panel without a browser, on images."""

from __future__ import annotations

import pytest
import torch

import workbench
from tests.conftest import IMAGES
from workbench import Prompt, Span
from workbench.widgets import PackingPanel


@pytest.mark.slow
def test_ranges_off_by_one_change_the_answer_about_an_image():
    explorer = workbench.explore(
        "digit-cards", IMAGES / "blue_7.png", "What digit is on the card?", judge=False, new_tokens=12
    )
    assert explorer.wait()
    assert explorer.answer() == "7"
    assert not [finding for finding in explorer.editor.findings if finding["severity"] != "info"]
    home = explorer.prompt.embedding_ranges
    explorer.editor.embedding_ranges = [[start + 1, stop + 1] for start, stop in home]
    assert explorer.wait()
    assert explorer.answer() == "blue"
    assert "range-over-text" in [finding["code"] for finding in explorer.editor.findings]
    explorer.editor.embedding_ranges = [list(pair) for pair in home]
    explorer.fault.value = "range +1"
    assert explorer.wait()
    assert explorer.answer() == "blue"  # what an engine does that is off by one
    explorer.close()


def test_plans_follow_the_controls():
    prompts = [
        Prompt([5] * length, [torch.zeros(length // 2, 4)], [(2, 2 + length // 2)], [Span()]) for length in (40, 60, 24)
    ]
    bench = PackingPanel(prompts, 64)
    assert bench.wait()
    assert "image/png" in bench._repr_mimebundle_()[0]
    assert len(bench.plan.batches) == 2
    assert "2 batches, 97% full" in bench.status.value
    before = bench.image.value
    bench.bidirectional.value, bench.budget.value = True, 16
    assert bench.wait()
    assert "exceed a batch of 16" in bench.status.value
    bench.budget.value = 100
    assert bench.wait()
    assert "padding" in bench.status.value
    assert bench.image.value != before
