"""Small models of every family, made once a session, and Transformers' own processors for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from .small_vlms import SOUND, VLMS, reader, save_vlm

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "images"


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
    """Transformers' combined processor of a family, built without the video part that needs torchvision."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)

    def get(model, vlm):
        built = getattr(transformers, vlm.processor)
        videos = {"video_processor": None} if "Video" in str(built.__init__.__code__.co_varnames).title() else {}
        part = "feature_extractor" if vlm.processor == "Qwen2AudioProcessor" else "image_processor"
        own = model.tokenizer
        for name, token in vlm.attributes.items():
            setattr(own, name, token)
            setattr(own, f"{name}_id", own.convert_tokens_to_ids(token))
        source = reader(vlm)
        if vlm.processor == "PaliGemmaProcessor":
            source.image_seq_length = 16
        return built(**{part: source, "tokenizer": own}, **videos, **vlm.processor_settings)

    return get


@pytest.fixture(scope="session")
def pictures():
    """Two noisy pictures of different sizes."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)) for size in ((60, 90, 3), (100, 70, 3))]


@pytest.fixture(scope="session")
def shown():
    """The repository's sample pictures: real handwriting."""
    return [SAMPLES / name for name in ("blue_7.png", "orange_3.png")]
