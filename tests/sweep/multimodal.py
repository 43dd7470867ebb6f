"""What the workbench makes of one multimodal class: from a checkpoint's files to a prompt, against the class's own forward with pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import workbench
from workbench.vision.class_prompt import process_items
from workbench.vision.messages import Item
from workbench.vision.tower import VisionTower, load_vision_tower
from workbench.vision.videos import Video

from .multimodal_settings import MARKERS
from .outcome import Outcome, _line
from .own_engine import own_engine_faults
from .small_multimodal import save_multimodal

TOLERANCE = 1e-5
_RATE = 16000


def items_of(modality: str) -> list[Any]:
    """Two items of different sizes."""
    noise = np.random.default_rng(3)
    if modality == "audio":
        return [noise.standard_normal(_RATE * seconds).astype(np.float32) * 0.1 for seconds in (2, 1)]
    sizes = ((40, 52), (64, 33))
    pixels = [noise.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    if modality == "image":
        return [Image.fromarray(each) for each in pixels]
    return [Video.of_frames(noise.integers(0, 255, (count, 40, 48, 3), dtype=np.uint8), 2.0) for count in (6, 4)]


def judge(class_name: str, model_type: str, raw: bool = False) -> Outcome:
    """Compare tower and prompt with the class: rows bit for bit, logits and greedy tokens of spliced prompts with those from pixels."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            network = save_multimodal(Path(folder), class_name, model_type)
        except Exception as error:
            if raw:
                raise
            return Outcome(class_name, "not built", _line(error))
        try:
            model = workbench.load_model(folder)
            tower = load_vision_tower(model)
            markers = tower.own_processor.markers
            faults, right, refused = [], [], []
            compared: list[bool] = []
            for modality in markers:
                for count in (1, 2):
                    name = modality if count == 1 else f"two {modality}s"
                    try:
                        found = list(
                            _faults(
                                model,
                                tower,
                                network,
                                [Item(modality, each) for each in items_of(modality)[:count]],
                                compared,
                            )
                        )
                        faults += [f"{name}: {each}" for each in found]
                        right += [] if found else [name]
                    except (workbench.ModelError, workbench.PromptError) as error:
                        if raw:
                            raise
                        refused.append(f"{name}: {_line(error)}")
        except (workbench.ModelError, workbench.PromptError) as error:
            if raw:
                raise
            return Outcome(class_name, "refused", _line(error).replace(folder, "the checkpoint"))
        except Exception as error:
            if raw:
                raise
            return Outcome(class_name, "raw", _line(error))
    if faults:
        return Outcome(class_name, "wrong", "; ".join(faults))
    detail = (
        ", ".join(right)
        + ("; numba engine" if compared and all(compared) else "")
        + "".join(f"; refused: {each}" for each in refused)
    )
    return Outcome(class_name, "right" if "image" in right or "audio" in right else "refused", detail)


def _faults(
    model: workbench.Model, tower: VisionTower, network: Any, items: list[Item], compared: list[bool]
) -> Iterator[str]:
    """Where rows or logits of a spliced prompt differ from the class's own; `compared` gets whether the Numba engine ran it."""
    processor = tower.own_processor
    written = MARKERS.get(tower.config.model_type, {})
    shown = " then ".join(written.get(item.modality, processor.markers[item.modality]) for item in items)
    text = f"Look: {shown} what is this?"
    processed = process_items(processor, text, items)
    prompt = tower.prompt(processed, items)
    whole = VisionTower(tower.location, tower.config, network, processor, tower.report, tower.weights_digest)
    for mine, theirs in zip(prompt.input_embeddings, whole.prompt(processed, items).input_embeddings, strict=True):
        if not torch.equal(mine, theirs):
            yield f"a row of the tower is off by {float((mine - theirs).abs().max()):.1e}"
    prompt.check()
    inputs = {name: value for name, value in processed.items() if name != "text_replacement_offsets"}
    with torch.no_grad():
        truth = network(**inputs).logits[0]
    logits = workbench.open_engine("transformers", model).trace(prompt, ["logits"])["logits"]
    error = float((logits.double() - truth.double()).norm() / truth.double().norm())
    if not error < TOLERANCE:
        yield f"logits are off by {error:.1e}"
    if not prompt.embedding_ranges:
        yield "no rows were injected"
    ours = own_engine_faults(model, prompt)
    compared.append(ours is not None)
    yield from ours or []
    zero = prompt.replace(input_embeddings=[torch.zeros_like(each) for each in prompt.input_embeddings])
    blind = workbench.open_engine("transformers", model).trace(zero, ["logits"])["logits"]
    if float((blind - logits).norm() / logits.norm()) < 1e-3:
        yield "the rows do not matter to the logits: the comparison shows nothing"
