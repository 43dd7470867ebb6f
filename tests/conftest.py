"""Shared fixtures: the real model, loaded once, engines on it, small models of every family, and sample images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.processing_utils import ProcessorMixin

import workbench
from tests.small_vlms import SOUND, VLMS, preprocessor, save_vlm

IMAGES = Path(__file__).resolve().parents[1] / "data" / "images"


@pytest.fixture(scope="session")
def model():
    return workbench.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def engine(model):
    return workbench.open_engine("numba", model)


@pytest.fixture(scope="session")
def reference(model):
    return workbench.open_engine("transformers", model)


@pytest.fixture(scope="session")
def japan(model):
    """A question about France with the row of ` Japan` injected over ` France`, and the same without injection."""
    ids = model.chat_ids("What is the capital of France?")
    france, japan = (model.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" France", " Japan"))
    at = ids.index(france)
    return workbench.Prompt(ids, [model.embedding_table[[japan]]], [(at, at + 1)]), workbench.Prompt(ids)


@pytest.fixture(scope="session")
def small_vlm(tmp_path_factory):
    """`small_vlm("llava")` -> Model, saved on first use."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = save_vlm(tmp_path_factory.mktemp(name), SOUND if name == "qwen2_audio" else VLMS[name])
        return made[name]

    return get


@pytest.fixture
def own_processor(monkeypatch):
    """A family's own Transformers processor, built without the video part, which needs torchvision."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)

    def get(model, vlm):
        built = getattr(transformers, vlm.processor)
        videos = {"video_processor": None} if "Video" in str(built.__init__.__code__.co_varnames).title() else {}
        part = "feature_extractor" if vlm.processor == "Qwen2AudioProcessor" else "image_processor"
        own = model.tokenizer
        for name, token in vlm.attributes.items():
            setattr(own, name, token)
            setattr(own, f"{name}_id", own.convert_tokens_to_ids(token))
        source = preprocessor(vlm)
        if vlm.processor == "PaliGemmaProcessor":
            source.image_seq_length = 16
        return built(**{part: source, "tokenizer": own}, **videos, **vlm.processor_settings)

    return get


@pytest.fixture(scope="session")
def images():
    """Two noisy images of different sizes."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)) for size in ((60, 90, 3), (100, 70, 3))]


@pytest.fixture(scope="session")
def shown():
    """The repository's sample images: real handwriting."""
    return [IMAGES / name for name in ("blue_7.png", "orange_3.png")]
