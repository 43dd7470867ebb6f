"""The whole bench without a browser: what it shows follows the ranges, errors appear in it, nothing old is shown as new."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from workbench import Prompt
from workbench.digit_cards.questions import QUESTIONS
from workbench.errors import PromptError

from .conftest import SAMPLES

PICTURES = [SAMPLES / "blue_7.png", SAMPLES / "green_5.png"]


@pytest.fixture(scope="module")
def bench():
    bench = workbench.explore("digit-cards", PICTURES, QUESTIONS["order"].text)
    assert bench.wait()
    return bench


def test_it_follows_the_ranges(bench):
    home = [list(pair) for pair in bench.prompt.embedding_ranges]
    assert bench.answer() == bench.answer("reference") == "blue 7, green 5"
    assert bench.comparison.verdict == "noise"
    assert [item["start"] for item in bench.patches.items] == [3, 52]
    assert "where they were built" in bench.status.value
    before = bench.map.values

    bench.editor.embedding_ranges = [home[0], [home[1][0] + 2, home[1][1] + 2]]
    assert bench.wait()
    assert bench.map.values != before
    assert bench.map.spans == bench.editor.embedding_ranges
    assert bench.patches.items[1]["start"] == 54
    assert "Ranges moved" in bench.status.value
    assert "ranges as built" in bench.words.value
    assert bench.answer() in bench.words.value

    bench.editor.embedding_ranges = [[4, 53], home[1]]
    assert bench.wait()
    assert "EmbeddingRangeError" in bench.status.value
    assert "do not run" in bench.verdict.banner.value
    assert bench.comparison is None
    assert (bench.map.values, bench.patches.values, bench.words.value) == (
        b"",
        b"",
        "",
    )  # nothing old stands for these ranges
    assert "do not run" in bench.map.message
    with pytest.raises(RuntimeError, match="no answer of 'engine' to these ranges yet"):
        bench.answer()

    bench._go_home()
    assert bench.wait()
    assert bench.editor.embedding_ranges == home
    assert bench.map.values == before
    assert bench.comparison.verdict == "noise"
    assert "noise" in bench.verdict.banner.value

    bench.judge.value = False
    assert bench.wait()
    bench.editor.embedding_ranges = [[2, 51], home[1]]
    assert bench.wait()
    assert "not compared at these ranges yet" in bench.verdict.banner.value
    bench.map.metric = "error"
    assert bench.map.values == b""
    assert "tick its box" in bench.map.message
    bench._go_home()
    assert bench.wait()
    assert "noise: at most" in bench.verdict.banner.value
    bench.map.metric = "change"
    bench.judge.value = True
    assert bench.wait()


def test_colours_that_are_not_there_yet_are_computed(bench):
    bench.map.metric = "lens"
    assert bench.wait()
    assert bench.map.words[-1][-1] == "blue"
    assert "lens at" in bench.patches.caption
    bench.map.metric = "error"
    assert bench.wait()
    shown = np.frombuffer(bench.map.values, np.float32).reshape(32, -1)
    at = bench.comparison.taps.index("layers.4")
    assert shown[5] == pytest.approx(bench.comparison.ratios[at].numpy(), rel=1e-5)
    bench.map.row = 3
    assert "error at layers.2" in bench.patches.caption
    bench.map.metric = "change"


def test_another_question(bench):
    bench.question.value = QUESTIONS["order"].text + " Please."
    assert bench.wait()
    assert len(bench.map.tokens) == len(bench.prompt)
    assert bench.prompt.embedding_ranges[0] == (3, 52)
    bench.question.value = QUESTIONS["order"].text
    assert bench.wait()


def test_without_a_browser_it_is_a_picture(bench):
    data, _ = bench._repr_mimebundle_()
    assert data["image/png"]
    assert bench.figure().axes


def test_messages_prompts_and_text(bench):
    model = bench.engine.model
    content = [{"type": "image", "image": str(PICTURES[0])}, {"type": "text", "text": QUESTIONS["digit"].text}]
    asked = workbench.explore(model, [{"role": "user", "content": content}], engine=bench.engine, judge=False)
    assert asked.wait()
    assert asked.answer() == "7"
    assert len(asked.patches.items) == 1
    assert asked.comparison is None
    given = workbench.explore(model, asked.prompt, engine=bench.engine, judge=False)
    assert given.wait()
    assert given.answer() == "7"
    text = workbench.explore(
        model, [{"role": "user", "content": "What is the capital of France?"}], engine=bench.engine, judge=False
    )
    assert text.wait()
    assert "No range" in text.status.value
    plain = workbench.explore(model, engine=bench.engine, judge=False)
    assert plain.wait()
    plain.editor.embedding_ranges = [[3, 4]]
    assert plain.wait()
    assert "0 input_embeddings but 1 embedding_ranges" in plain.status.value
    for wrong, words in (([{"role": "user"}], "give a dict with role"), ({"content": "x"}, "give a dict with role")):
        with pytest.raises(PromptError, match=words):
            workbench.explore(model, wrong, engine=bench.engine)
    with pytest.raises(PromptError, match="question=5"):
        workbench.explore(model, [], 5)
    with pytest.raises(ValueError, match="new_tokens=0"):
        workbench.explore(model, asked.prompt, engine=bench.engine, new_tokens=0)
    with pytest.raises(workbench.ModelError, match="the engine runs digit-cards, not smollm2-135m"):
        workbench.explore("smollm2-135m", engine=bench.engine)
    plain.close()
    plain.editor.embedding_ranges = []
    assert plain.wait(5.0)
    with pytest.raises(PromptError, match="leave one of them out"):
        workbench.explore(model, asked.prompt, "What?")
    with pytest.raises(PromptError, match="does not exist"):
        workbench.explore(model, "no/such/picture.png", "What?", engine=bench.engine)


def test_an_engine_that_fails_says_so_in_the_view(bench):
    class Failing(type(bench.engine)):
        def __init__(self, inner):
            self.__dict__ = inner.__dict__

        def lens(self, states, *, normed=False):
            raise RuntimeError("the head fell off")

    failing = workbench.explore(bench.engine.model, bench.prompt, engine=Failing(bench.engine), judge=False)
    assert failing.wait()
    failing.map.metric = "lens"
    assert failing.wait()
    assert "the head fell off" in failing.status.value
    failing.map.metric = "change"
    failing.editor.embedding_ranges = [[3, 52], [53, 102]]
    assert failing.wait()
    assert "Ranges moved" in failing.status.value


def test_a_prompt_of_random_rows_has_no_pictures(bench):
    prompt = Prompt(range(3, 23), [torch.randn(4, 576)], [(2, 6)])
    shown = workbench.explore(bench.engine.model, prompt, engine=bench.engine, judge=False)
    assert shown.wait()
    assert [item["lines"] for item in shown.patches.items] == [1]
