"""The benches of notebooks 03 and 05 without a browser: what they show follows the controls, and errors appear in the view."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

import workbench
from workbench import Prompt, Span
from workbench.patch_map import PatchMap, patch_of
from workbench.vision.build import build_prompt
from workbench.vision.images import open_image
from workbench.vision.tower import load_vision_tower
from workbench.widgets import PictureBench, PlanBench

from .conftest import SAMPLES


@pytest.fixture(scope="module")
def pictures_bench():
    model = workbench.load_model("digit-cards")
    bench = PictureBench(
        workbench.open_engine("numba", model),
        load_vision_tower(model),
        [SAMPLES / "blue_7.png"],
        "What digit is on the card?",
    )
    assert bench.wait()
    return bench


def test_in_place_and_off_by_one(pictures_bench):
    bench = pictures_bench
    assert bench.answer == "7"
    assert "Every row stands over its placeholder" in bench.status.value
    before = bench.image.value
    bench.shift.value = 1
    assert bench.wait()
    assert bench.answer == "blue"
    assert "1 text token lost under rows" in bench.status.value
    assert "What" in bench.status.value
    assert bench.image.value != before
    assert Image.open(io.BytesIO(bench.image.value)).size[0] == 1100
    bench.shift.value = 0
    assert bench.wait()


def test_the_ranges_stay_inside_the_prompt(pictures_bench):
    bench = pictures_bench
    bench.shift.value = -4  # only three tokens stand before the picture
    assert bench.wait()
    assert bench.prompt.embedding_ranges[0][0] == 0
    assert "Moved by -3" in bench.status.value
    bench.shift.value = 0
    assert bench.wait()


def test_an_error_is_shown_and_the_bench_goes_on(pictures_bench):
    bench = pictures_bench
    bench.question.value = "What is <image>?"
    assert bench.wait()
    assert "PromptError" in bench.status.value
    assert "places" in bench.status.value
    bench.question.value = "What colour is it?"
    assert bench.wait()
    assert bench.answer == "blue"


def test_patches_run_line_by_line_and_kinds_name_every_token():
    model = workbench.load_model("digit-cards")
    picture = open_image(SAMPLES / "blue_7.png")
    prompt = build_prompt(model, "What?", [picture])
    assert [patch_of(row, (7, 7)) for row in (0, 6, 7, 48)] == [(0, 0), (0, 6), (1, 0), (6, 6)]
    assert patch_of(9, (1, 2, 3)) == (1, 0)  # a second frame begins anew
    kinds = PatchMap([picture], prompt, model.tokens(prompt.input_ids), shift=2).kinds()
    assert kinds[3:5] == ["bare", "bare"]
    assert kinds[5:52] == ["row"] * 47
    assert kinds[52:54] == ["lost", "lost"]
    assert set(kinds[:3] + kinds[54:]) == {"text"}


def test_plans_follow_the_controls():
    prompts = [
        Prompt([5] * length, [torch.zeros(length // 2, 4)], [(2, 2 + length // 2)], [Span()]) for length in (40, 60, 24)
    ]
    bench = PlanBench(prompts, 64)
    assert bench.wait()
    assert "image/png" in bench._repr_mimebundle_()[0]
    assert len(bench.plan.chunks) == 2
    assert "2 chunks, 97% full" in bench.status.value
    before = bench.image.value
    bench.bidirectional.value, bench.budget.value = True, 16
    assert bench.wait()
    assert "exceed a chunk of 16" in bench.status.value
    bench.budget.value = 100
    assert bench.wait()
    assert "padding" in bench.status.value
    assert bench.image.value != before
