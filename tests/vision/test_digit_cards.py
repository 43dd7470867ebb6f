"""The trained model reads held-out real handwriting in every engine; scenes and the data split are correct."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import workbench
from data.digit_cards.training.cards import SIZE, draw_scene, render, split
from data.digit_cards.training.questions import QUESTIONS
from tests.conftest import IMAGES
from workbench.analysis.pipelines import compare_pipelines
from workbench.package_data import data_folder
from workbench.vision.prompt_builder import build_multimodal, build_prompt
from workbench.vision.tower import load_vision_tower

pytestmark = pytest.mark.slow

GREEDY = workbench.GenerationConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def cards():
    return workbench.load_model("digit-cards")


@pytest.fixture(scope="module")
def tower(cards):
    return load_vision_tower(cards)


@pytest.fixture(scope="module")
def engines(cards):
    return {kind: workbench.open_engine(kind, cards) for kind in ("numba", "transformers")}


def answer(model, engine, prompt):
    return model.tokenizer.decode(engine.generate(prompt, GREEDY).token_ids)


@pytest.mark.parametrize(
    ("question", "names", "wanted"),
    [
        ("digit", ["blue_7"], "7"),
        ("colour", ["orange_3"], "orange"),
        ("order", ["green_5", "blue_7"], "green 5, blue 7"),
        ("order", ["blue_7", "green_5", "orange_3"], "blue 7, green 5, orange 3"),
        ("row", ["row_of_two"], "orange 1, green 7"),
        ("row", ["row_of_three"], "red 5, black 8, purple 1"),
        ("count", ["row_of_three"], "three"),
    ],
)
def test_sample_images_are_read_by_every_engine(question, names, wanted, cards, tower, engines):
    images = [IMAGES / f"{name}.png" for name in names]
    prompt = build_prompt(cards, QUESTIONS[question].text, images, tower=tower)
    assert {kind: answer(cards, engine, prompt) for kind, engine in engines.items()} == dict.fromkeys(engines, wanted)


def test_multimodal_engine_reads_a_sample_image(cards, tower):
    engine = workbench.open_engine("transformers-multimodal", cards)
    prompt = build_multimodal(cards, QUESTIONS["digit"].text, [IMAGES / "blue_7.png"], tower=tower)
    assert answer(cards, engine, prompt) == "7"


def test_numba_engine_matches_transformers(cards, tower, engines):
    prompt = build_prompt(cards, QUESTIONS["order"].text, [IMAGES / "blue_7.png", IMAGES / "green_5.png"], tower=tower)
    assert workbench.check_engine(engines["numba"], prompt).verdict in ("same", "noise")
    swapped = prompt.replace(input_embeddings=prompt.input_embeddings[::-1])
    assert answer(cards, engines["numba"], swapped) == "green 5, blue 7"


def test_held_out_handwriting_is_read_in_26_of_30_scenes(cards, tower, engines):
    """Thirty new scenes for each of the model's three main questions; the recorded run has 360 of each."""
    generator = np.random.default_rng(99)
    for kind in ("digit", "colour", "order"):
        posed = [QUESTIONS[kind].pose(generator, split(held_out=True)) for _ in range(30)]
        prompts = [
            build_prompt(cards, QUESTIONS[kind].text, [render(scene) for scene in scenes], tower=tower)
            for scenes, _ in posed
        ]
        with ThreadPoolExecutor(len(prompts)) as pool:  # the engine runs them in one batch
            answers = list(pool.map(lambda prompt: answer(cards, engines["numba"], prompt), prompts))
        right = sum(given == wanted for given, (_, wanted) in zip(answers, posed, strict=True))
        assert right >= 26, f"{kind}: {right} of 30"


def test_recorded_accuracy_is_at_least_95_percent():
    record = json.loads((data_folder("data/digit_cards") / "evaluation.json").read_text())
    shares = {kind: record["right"][kind] / record["questions"] for kind in QUESTIONS}
    assert min(shares.values()) >= 0.95, shares
    assert sum(map(sum, record["confusion"])) == record["questions"]


def test_training_and_held_out_handwriting_are_disjoint():
    training, held_out = set(split(False).tolist()), set(split(True).tolist())
    assert not training & held_out
    assert len(training | held_out) == 1797
    generator = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(generator, split(True), int(generator.integers(1, 4)))
        assert {card.index for card in scene.cards} <= held_out


def test_rendering_a_scene_is_deterministic():
    scene = draw_scene(np.random.default_rng(3), split(True), 3)
    first, again = render(scene), render(scene)
    assert first.size == (SIZE, SIZE)
    assert first.tobytes() == again.tobytes()
    assert [card.centre[0] for card in scene.cards] == sorted(card.centre[0] for card in scene.cards)


def test_both_pipelines_give_equal_answers_and_report_their_cost(cards):
    two, one = compare_pipelines(cards, QUESTIONS["order"].text, [IMAGES / "blue_7.png", IMAGES / "green_5.png"])
    assert two.answer == one.answer == "blue 7, green 5"
    assert two.features_seconds > 0
    assert two.vision_bytes < 0.03 * one.weight_bytes
    assert two.vision_bytes + two.language_bytes == one.weight_bytes
