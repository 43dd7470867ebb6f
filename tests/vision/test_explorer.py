"""The whole explorer without a browser: it follows the ranges, shows errors, and never shows outdated values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from data.digit_cards.training.questions import QUESTIONS
from tests.conftest import IMAGES
from workbench import Prompt
from workbench.errors import PromptError
from workbench.widgets.why_panel import MAP, READS, RESTS

pytestmark = pytest.mark.slow

CARDS = [IMAGES / "blue_7.png", IMAGES / "green_5.png"]


@pytest.fixture(scope="module")
def explorer():
    explorer = workbench.explore("digit-cards", CARDS, QUESTIONS["order"].text)
    assert explorer.wait()
    return explorer


def test_all_views_follow_the_ranges(explorer):
    home = [list(pair) for pair in explorer.prompt.embedding_ranges]
    assert explorer.answer() == explorer.answer("reference") == "blue 7, green 5"
    assert explorer.comparison.verdict == "noise"
    assert [item["start"] for item in explorer.patches.items] == [3, 52]
    assert "Ranges unchanged" in explorer.status.value
    before = explorer.map.values

    explorer.editor.embedding_ranges = [home[0], [home[1][0] + 2, home[1][1] + 2]]
    assert explorer.wait()
    assert explorer.map.values != before
    assert explorer.map.spans == explorer.editor.embedding_ranges
    assert explorer.patches.items[1]["start"] == 54
    assert "Ranges moved" in explorer.status.value
    assert "ranges as built" in explorer.words.value
    assert explorer.answer() in explorer.words.value

    explorer.editor.embedding_ranges = [[4, 53], home[1]]
    assert explorer.wait()
    assert "EmbeddingRangeError" in explorer.status.value
    assert "do not run" in explorer.verdict.banner.value
    assert explorer.comparison is None
    assert (explorer.map.values, explorer.patches.values, explorer.words.value) == (
        b"",
        b"",
        "",
    )  # no outdated values are shown
    assert "do not run" in explorer.map.message
    with pytest.raises(RuntimeError, match="no answer of 'engine' to these ranges yet"):
        explorer.answer()

    explorer._go_home()
    assert explorer.wait()
    assert explorer.editor.embedding_ranges == home
    assert explorer.map.values == before
    assert explorer.comparison.verdict == "noise"
    assert "noise" in explorer.verdict.banner.value

    explorer.judge.value = False
    assert explorer.wait()
    explorer.editor.embedding_ranges = [[2, 51], home[1]]
    assert explorer.wait()
    assert "not compared at these ranges yet" in explorer.verdict.banner.value
    explorer.map.metric = "error"
    assert explorer.map.values == b""
    assert "tick 'compare automatically'" in explorer.map.message
    explorer._go_home()
    assert explorer.wait()
    assert "noise: at most" in explorer.verdict.banner.value
    explorer.map.metric = "change"
    explorer.judge.value = True
    assert explorer.wait()


def test_missing_metrics_are_computed_when_selected(explorer):
    explorer.map.metric = "lens"
    assert explorer.wait()
    assert explorer.map.words[-1][-1] == "blue"
    assert "lens at" in explorer.patches.caption
    explorer.map.metric = "error"
    assert explorer.wait()
    shown = np.frombuffer(explorer.map.values, np.float32).reshape(32, -1)
    at = explorer.comparison.taps.index("layers.4")
    assert shown[5] == pytest.approx(explorer.comparison.ratios[at].numpy(), rel=1e-5)
    explorer.map.row = 3
    assert "error at layers.2" in explorer.patches.caption
    explorer.map.metric = "change"


def test_new_question_rebuilds_the_prompt(explorer):
    explorer.question.value = QUESTIONS["order"].text + " Please."
    assert explorer.wait()
    assert len(explorer.map.tokens) == len(explorer.prompt)
    assert explorer.prompt.embedding_ranges[0] == (3, 52)
    explorer.question.value = QUESTIONS["order"].text
    assert explorer.wait()


def test_mime_bundle_contains_an_image(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert data["image/png"]
    assert explorer.figure().axes


def test_messages_prompts_and_text_are_accepted_and_bad_input_refused(explorer):
    model = explorer.engine.model
    content = [{"type": "image", "image": str(CARDS[0])}, {"type": "text", "text": QUESTIONS["digit"].text}]
    asked = workbench.explore(model, [{"role": "user", "content": content}], engine=explorer.engine, judge=False)
    assert asked.wait()
    assert asked.answer() == "7"
    assert len(asked.patches.items) == 1
    assert asked.comparison is None
    given = workbench.explore(model, asked.prompt, engine=explorer.engine, judge=False)
    assert given.wait()
    assert given.answer() == "7"
    text = workbench.explore(
        model, [{"role": "user", "content": "What is the capital of France?"}], engine=explorer.engine, judge=False
    )
    assert text.wait()
    assert "No range" in text.status.value
    plain = workbench.explore(model, engine=explorer.engine, judge=False)
    assert plain.wait()
    plain.editor.embedding_ranges = [[3, 4]]
    assert plain.wait()
    assert "0 input_embeddings but 1 embedding_ranges" in plain.status.value
    for wrong, words in (([{"role": "user"}], "give a dict with role"), ({"content": "x"}, "give a dict with role")):
        with pytest.raises(PromptError, match=words):
            workbench.explore(model, wrong, engine=explorer.engine)
    with pytest.raises(PromptError, match="question=5"):
        workbench.explore(model, [], 5)
    with pytest.raises(ValueError, match="new_tokens=0"):
        workbench.explore(model, asked.prompt, engine=explorer.engine, new_tokens=0)
    with pytest.raises(workbench.ModelError, match="the engine runs digit-cards, not smollm2-135m"):
        workbench.explore("smollm2-135m", engine=explorer.engine)
    plain.close()
    plain.editor.embedding_ranges = []
    assert plain.wait(5.0)
    with pytest.raises(PromptError, match="leave one out"):
        workbench.explore(model, asked.prompt, "What?")
    with pytest.raises(PromptError, match="does not exist"):
        workbench.explore(model, "no/such/image.png", "What?", engine=explorer.engine)


def test_engine_error_is_shown_in_the_view(explorer):
    class Failing(type(explorer.engine)):
        def __init__(self, inner):
            self.__dict__ = dict(inner.__dict__)

        def logit_lens(self, states, *, normed=False):
            raise RuntimeError("the head fell off")

    failing = workbench.explore(explorer.engine.model, explorer.prompt, engine=Failing(explorer.engine), judge=False)
    assert failing.wait()
    failing.map.metric = "lens"
    assert failing.wait()
    assert "the head fell off" in failing.status.value
    failing.map.metric = "change"
    failing.editor.embedding_ranges = [[3, 52], [53, 102]]
    assert failing.wait()
    assert "Ranges moved" in failing.status.value


def test_rows_without_an_image_are_shown_in_one_line(explorer):
    prompt = Prompt(range(3, 23), [torch.randn(4, 576)], [(2, 6)])
    shown = workbench.explore(explorer.engine.model, prompt, engine=explorer.engine, judge=False)
    assert shown.wait()
    assert [item["lines"] for item in shown.patches.items] == [1]


def go_home(explorer, judge=False):
    explorer.judge.value = judge
    explorer.fault.value = "none"
    explorer._go_home()
    assert explorer.wait()


def test_why_panel_follows_pin_colour_ranges_and_faults(explorer):
    go_home(explorer)
    why, home = explorer.why, [list(pair) for pair in explorer.prompt.embedding_ranges]
    assert why.lens is None  # folded: nothing is computed
    explorer.why_fold.selected_index = 0
    assert explorer.wait()
    assert "".join(why.lens.texts) == explorer.answer() == "blue 7, green 5"

    why.strip.pinned = 4
    assert explorer.wait()
    assert (why.colour.value, explorer.map.metric) == (READS, "read")
    read = explorer._maps.values["read"]
    assert read.shape == (len(explorer.map.taps), len(explorer.prompt))
    assert np.isnan(read[0]).all()  # `embed` has no attention
    first, second = (read[12:-1, start:stop].sum() for start, stop in home)
    assert second > 1.5 * first  # "green" is on the second card
    explorer.map.row = 25
    assert explorer.wait()
    assert np.array_equal(np.frombuffer(explorer.patches.values, np.float32), read[25])
    assert len(explorer.editor.shades) == 4 * len(explorer.prompt)

    why.colour.value = RESTS
    assert explorer.wait()
    direct = workbench.attribute(explorer.engine, explorer.prompt, [why.lens.tokens[4]], answer=why.lens.tokens[:5])
    assert why.attribution.target == direct.target
    assert why.attribution.items == pytest.approx(direct.items, abs=1e-4)
    assert direct.items[1] > direct.items[0] + 5
    shown = np.frombuffer(explorer.patches.values, np.float32)[slice(*home[1])]
    assert np.nanargmax(shown) == np.argmax(direct.rows(1))
    assert "' green'" in why.found.value or "&#x27; green&#x27;" in why.found.value
    assert why.figure().axes

    explorer.fault.value = "range +1"
    assert explorer.wait()
    assert "".join(why.lens.texts) == explorer.answer()
    explorer.fault.value = "none"
    explorer.editor.embedding_ranges = [[4, 53], home[1]]  # they overlap
    assert explorer.wait()
    assert why.strip.tokens == []
    assert "do not run" in why.strip.message
    assert explorer.editor.shades == b""
    why.colour.value = MAP
    go_home(explorer)
    assert "".join(why.lens.texts) == "blue 7, green 5"
    explorer.why_fold.selected_index = None
    assert explorer.wait()


def test_tap_map_chooses_what_the_map_shows(explorer):
    go_home(explorer)
    explorer.tap_map.tap = "layers.23.attention"
    assert explorer.wait()
    assert explorer.map.taps == [f"layers.{number}.attention" for number in range(30)]
    assert explorer.map.row == 23
    taps = ["layers.23.attention"]
    injected, plain = (
        explorer.engine.trace(prompt, taps)[taps[0]].double()
        for prompt in (explorer.prompt, explorer.prompt.without_embeddings)
    )
    change = (injected - plain).norm(dim=1) / plain.norm(dim=1)
    assert np.allclose(explorer._maps.values["change"][23], change.numpy(), rtol=1e-4)
    explorer.editor.embedding_ranges = [[3, 52], [53, 102]]
    assert explorer.wait()
    assert explorer.map.taps[0] == "layers.0.attention"
    explorer.map.row = 2
    assert explorer.tap_map.tap == "layers.2.attention"
    explorer.tap_map.tap = "layers.2"
    assert explorer.wait()
    assert (explorer.map.taps[0], explorer.map.row) == ("embed", 3)
    go_home(explorer, judge=True)
    assert explorer.comparison.verdict == "noise"
    assert explorer.tap_map.figure().axes


def test_why_panel_says_what_an_engine_lacks(explorer):
    model = explorer.engine.model
    width, vocab = model.text_config.hidden_size, model.text_config.vocab_size
    engine = workbench.engine_from(
        lambda prompt: {"embed": torch.zeros(len(prompt), width), "logits": torch.ones(len(prompt), vocab)}, model
    )
    other = workbench.explore(model, explorer.prompt, engine=engine, judge=False, new_tokens=2)
    other.why_fold.selected_index = 0
    assert other.wait()
    assert "no tap 'layers.*'" in other.why.strip.message
    with pytest.raises(RuntimeError, match="no tap"):
        other.why.figure()
    other.close()
    engine.close()
