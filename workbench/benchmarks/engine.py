"""Speed of the Numba engine compared with Transformers, and of what one move of a slider in a panel costs.

Run it with `python -m workbench.benchmarks engine`.

All jobs are timed in one run, interleaved, and medians are reported: only ratios within a run are meaningful.
"""

from __future__ import annotations

import atexit
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from PIL import Image

from ..analysis.injection_effect import injection_effect
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.transformers.reference import TransformersReference
from ..engines.types import GenerationConfig
from ..models import load_model
from ..plots.injection_effect import InjectionEffectFigure
from ..prompt import Prompt
from ..vision.feature_store import FeatureStore
from ..vision.tower import load_vision_tower
from .batching import uneven_prompts

NEW_TOKENS = 32
IMAGES = 50


def run(model_name: str, rounds: int) -> dict[str, float]:
    """Time all jobs, print a table, and return `{job: median seconds}`."""
    model = load_model(model_name)
    engine, reference = NumbaEngine(model), TransformersReference(model)
    ids = model.chat_ids("Tell me a story about a fox and the moon, please. " * 2)[:64]
    prompt = Prompt(ids, [model.token_rows(ids[30:34])], [(30, 34)])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    batch = torch.tensor([ids])
    effect, plain = injection_effect(engine, prompt)
    figure = InjectionEffectFigure(effect)

    def transformers_generate() -> None:
        reference.network.generate(batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    uneven = uneven_prompts(ids * 6, model.embedding_table, 16)
    padded = _padded(uneven)

    @torch.no_grad()
    def transformers_padded() -> None:
        reference.decoder(**padded, use_cache=False)

    longest = max(map(len, uneven))
    filled = [each.replace(input_ids=[*each.input_ids, *[0] * (longest - len(each))]) for each in uneven]
    jobs: dict[str, Callable[[], object]] = {
        f"generate {NEW_TOKENS} tokens, numba": lambda: engine.generate(prompt, config),
        f"generate {NEW_TOKENS} tokens, transformers": transformers_generate,
        "trace of every layer, numba": lambda: engine.trace(prompt),
        "trace of every layer, transformers": lambda: reference.trace(prompt),
        "slider: run and compare": lambda: injection_effect(engine, prompt, plain),
        "slider: draw": lambda: figure.png(effect),
        f"prefill {len(uneven)} uneven, packed, numba": lambda: engine.prefill_packed(uneven),
        f"prefill {len(uneven)} uneven, padded, numba": lambda: engine.prefill_packed(filled, longest * len(filled)),
        f"prefill {len(uneven)} uneven, padded, transformers": transformers_padded,
    }
    jobs |= _image_jobs()
    tokens = {name: sum(map(len, uneven)) for name in jobs if name.startswith("prefill")}
    tokens |= {name: NEW_TOKENS for name in jobs if name.startswith("generate")}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if repeat:  # the first round compiles and warms up
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{model.name}, float32, {len(ids)} prompt tokens, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    medians = {name: median(times) for name, times in seconds.items()}
    for name, value in medians.items():
        rate = f"{tokens[name] / value:8.1f} tokens/s" if name in tokens else ""
        print(f"{name:44} {value * 1000:9.3f} ms {rate}")
    return medians


def _image_jobs() -> dict[str, Callable[[], object]]:
    """Return jobs that get the features of `IMAGES` images one at a time, from a tower and from a store."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tower, store = load_vision_tower(load_model("digit-cards")), FeatureStore(folder)
    generator = np.random.default_rng(0)  # what the images show does not change the time
    paths = [f"{folder}/{number}.png" for number in range(IMAGES)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(path)
    return {
        f"{IMAGES} images through the tower": lambda: [tower.features([path]) for path in paths],
        f"{IMAGES} images out of the store": lambda: [store.features(tower, [path]) for path in paths],
    }


def _padded(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """The inputs of a padded batch: the ids of all prompts, padded on the right, and their mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt.input_ids, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}
