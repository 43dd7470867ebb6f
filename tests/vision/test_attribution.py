"""What an answer takes from rows and image parts: on digit-cards it is the card, and bad input is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import workbench
from data.digit_cards.training.cards import render, split
from data.digit_cards.training.questions import QUESTIONS
from tests.conftest import IMAGES
from workbench.plots.attribution import attribution_figure
from workbench.vision.prompt_builder import build_prompt
from workbench.vision.tower import load_vision_tower

pytestmark = pytest.mark.slow
LINES = COLUMNS = 7


@pytest.fixture(scope="module")
def cards():
    model = workbench.load_model("digit-cards")
    return model, load_vision_tower(model), workbench.open_engine("numba", model)


@pytest.fixture(scope="module")
def seven(cards):
    model, tower, _ = cards
    return build_prompt(model, QUESTIONS["digit"].text, [IMAGES / "blue_7.png"], tower=tower)


def rows_of(card):
    """The rows whose cell overlaps with the card."""
    cell = 224 / COLUMNS
    (x, y), width, height = card.centre, card.width, card.width * 1.3
    return [
        line * COLUMNS + column
        for line in range(LINES)
        for column in range(COLUMNS)
        if abs((column + 0.5) * cell - x) < (width + cell) / 2 and abs((line + 0.5) * cell - y) < (height + cell) / 2
    ]


def test_the_answer_about_a_digit_rests_on_its_card(cards):
    """Over held-out cards: at least 90 % of what "which digit" takes from the image is on the card."""
    model, tower, engine = cards
    generator = np.random.default_rng(11)
    shares = []
    for _ in range(4):
        (scene,), wanted = QUESTIONS["digit"].pose(generator, split(held_out=True))
        image = render(scene)
        prompt = build_prompt(model, QUESTIONS["digit"].text, [image], tower=tower)
        found = workbench.attribute(engine, prompt, images=[image], tower=tower)
        if found.text != wanted:
            continue  # what a wrong answer rests on is not known
        assert found.complete
        assert found.items[0] > 10 * found.noise
        shares.append(found.share(0, rows_of(scene.cards[0])))
    assert len(shares) >= 3
    assert np.mean(shares) >= 0.9, shares


def test_each_part_of_an_answer_rests_on_its_own_image(cards):
    model, tower, engine = cards
    paths = [IMAGES / "blue_7.png", IMAGES / "green_5.png"]
    prompt = build_prompt(model, QUESTIONS["order"].text, paths, tower=tower)
    first, second = (
        workbench.attribute(engine, prompt, target, images=paths, tower=tower, baseline="blur", max_runs=40)
        for target in ("7", "5")
    )
    assert (first.text.strip(), second.text.strip()) == ("7", "5")
    assert first.share(0, range(49)) > 0.9
    assert second.share(1, range(49)) > 0.9
    assert first.items[0] > 5 * abs(first.items[1])


@pytest.mark.parametrize("baseline", ["mean", "placeholder", "row", "rows"])
def test_replaced_rows_are_measured_as_by_hand(baseline, cards, seven):
    model, _, engine = cards
    item = seven.input_embeddings[0]
    given = {"row": torch.zeros(item.shape[1]), "rows": [item.flip(0)]}.get(baseline, baseline)
    found = workbench.attribute(engine, seven, baseline=given, max_runs=16)
    rows = {
        "mean": item.mean(dim=0).expand_as(item),
        "placeholder": model.token_rows([seven.input_ids[seven.embedding_ranges[0][0]]]).expand_as(item),
        "row": torch.zeros_like(item),
        "rows": item.flip(0),
    }[baseline]
    config = workbench.GenerationConfig(max_new_tokens=1, output_logits="generation")

    def odds(items):
        logits = engine.generate(seven.replace(input_embeddings=[items]), config).logits[-1].double()
        chance = logits.softmax(dim=0)[found.target[0]]
        return float(chance.log() - (-chance).log1p())

    assert found.odds == pytest.approx(odds(item), abs=1e-3)
    assert found.items[0] == pytest.approx(odds(item) - odds(rows), abs=1e-3)
    block = found.blocks[3]
    part = item.clone()
    part[list(block.rows)] = rows[list(block.rows)]
    assert block.change == pytest.approx(odds(item) - odds(part), abs=1e-3)
    assert not found.complete  # 16 runs are not enough
    assert found.runs <= 17


def test_blocks_cover_every_row_and_a_figure_shows_them(cards, seven):
    _, tower, engine = cards
    image = Image.open(IMAGES / "blue_7.png")
    found = workbench.attribute(engine, seven, images=[image], tower=tower)
    assert np.isfinite(found.rows(0)).all()
    assert sorted(row for block in found.blocks[:12] for row in block.rows) == list(range(49))
    figure = attribution_figure(found, [image])
    assert figure.axes[0].get_title() == f"image 0: without it {-found.items[0]:+.2f} nats"
    assert "most from rows" in str(found)


def test_a_cancelled_run_returns_what_it_has(cards, seven):
    _, _, engine = cards
    cancelled = threading.Event()
    fractions = []

    def progress(fraction):
        fractions.append(fraction)
        if len(fractions) == 3:
            cancelled.set()

    found = workbench.attribute(engine, seven, progress=progress, cancelled=cancelled)
    assert not found.complete
    assert np.isfinite(found.items[0])
    assert 0 < np.isnan(found.rows(0)).sum() < 49
    assert "stopped early" in str(found)
    assert fractions == sorted(fractions)
    cancelled.set()
    nothing = workbench.attribute(engine, seven, cancelled=cancelled)
    assert np.isnan(nothing.odds)
    assert np.isnan(nothing.share(0, [0]))


def test_bad_input_is_refused(cards, seven):
    model, tower, engine = cards
    path = IMAGES / "blue_7.png"
    with pytest.raises(workbench.PromptError, match="has no input_embeddings"):
        workbench.attribute(engine, workbench.Prompt(model.chat_ids("Hello")))
    with pytest.raises(ValueError, match=r"target='8' is not in the answer '7'"):
        workbench.attribute(engine, seven, "8")
    assert workbench.attribute(engine, seven, "8", answer="8", max_runs=1).text == "8"
    with pytest.raises(ValueError, match="the answer has no tokens"):
        workbench.attribute(engine, seven, answer="")
    with pytest.raises(workbench.PromptError, match="the baseline of item 0 is not finite"):
        workbench.attribute(engine, seven, baseline=torch.full((576,), torch.nan))
    with pytest.raises(workbench.PromptError, match=r"baseline has shapes \[\(3,\)\]"):
        workbench.attribute(engine, seven, baseline=torch.zeros(3))
    with pytest.raises(workbench.PromptError, match="baseline='median': use one of"):
        workbench.attribute(engine, seven, baseline="median")
    with pytest.raises(workbench.PromptError, match="covered with their mean or blur"):
        workbench.attribute(engine, seven, images=[path], tower=tower, baseline="placeholder")
    with pytest.raises(workbench.PromptError, match="2 images for 1 items"):
        workbench.attribute(engine, seven, images=[path, path], tower=tower)
    with pytest.raises(workbench.PromptError, match=r"images\[0\] does not give the rows of item 0"):
        workbench.attribute(engine, seven, images=[IMAGES / "green_5.png"], tower=tower)
    flat = seven.replace(spans=[workbench.Span()])
    with pytest.raises(workbench.PromptError, match="form no grid over its image"):
        workbench.attribute(engine, flat, images=[path], tower=tower)
    with pytest.raises(ValueError, match="max_runs=0"):
        workbench.attribute(engine, seven, max_runs=0)


def test_an_engine_without_logits_is_refused_by_name(cards, seven, monkeypatch):
    _, _, engine = cards
    whole = engine.generate

    def without(prompt, config=None):
        output = whole(prompt, config)
        object.__setattr__(output, "logits", None)
        return output

    monkeypatch.setattr(engine, "generate", without)
    with pytest.raises(workbench.ModelError, match="numba does not return logits"):
        workbench.attribute(engine, seven)
