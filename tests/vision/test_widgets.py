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
    assert explorer.answer() == "blue"  # as an engine that is off by one answers
    explorer.close()


def test_packing_panel_follows_its_controls():
    prompts = [
        Prompt([5] * length, [torch.zeros(length // 2, 4)], [(2, 2 + length // 2)], [Span()]) for length in (40, 60, 24)
    ]
    panel = PackingPanel(prompts, 64)
    assert panel.wait()
    assert "image/png" in panel._repr_mimebundle_()[0]
    assert len(panel.plan.batches) == 2
    assert "2 batches, 97% full" in panel.status.value
    before = panel.image.value
    panel.bidirectional.value, panel.budget.value = True, 16
    assert panel.wait()
    assert "exceed a batch of 16" in panel.status.value
    panel.budget.value = 100
    assert panel.wait()
    assert "padding" in panel.status.value
    assert panel.image.value != before
