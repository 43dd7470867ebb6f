"""Speed of the Numba engine beside Transformers, and of what a slider waits for: `workbench bench`.

Everything is timed in one run, in turns, and the median is reported: only ratios within a run mean something.
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

from .digit_cards.cards import draw_scene, render, split
from .engines.messages import GenerationConfig
from .engines.numba_engine.engine import NumbaEngine
from .engines.transformers_reference import TransformersReference
from .landing import land
from .models import load_model
from .plots.landing import LandingPicture
from .prompt import Prompt
from .vision.features import FeatureStore
from .vision.tower import load_vision_tower

NEW_TOKENS = 32
PICTURES = 50


def run(model_name: str, rounds: int) -> dict[str, float]:
    """Print a table; return `{job: median seconds}`."""
    model = load_model(model_name)
    engine, reference = NumbaEngine(model), TransformersReference(model)
    ids = model.chat_ids("Tell me a story about a fox and the moon, please. " * 2)[:64]
    prompt = Prompt(ids, [model.token_rows(ids[30:34])], [(30, 34)])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    batch = torch.tensor([ids])
    landing, plain = land(engine, prompt)
    picture = LandingPicture(landing)

    def transformers_generate() -> None:
        reference.network.generate(batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    uneven = _uneven(ids, model.embedding_table)
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
        "slider: run and compare": lambda: land(engine, prompt, plain),
        "slider: draw": lambda: picture.png(landing),
        f"prefill {len(uneven)} uneven, packed, numba": lambda: engine.prefill_packed(uneven),
        f"prefill {len(uneven)} uneven, padded, numba": lambda: engine.prefill_packed(filled, longest * len(filled)),
        f"prefill {len(uneven)} uneven, padded, transformers": transformers_padded,
    }
    jobs |= _picture_jobs()
    tokens = {name: sum(map(len, uneven)) for name in jobs if name.startswith("prefill")}
    tokens |= {name: NEW_TOKENS for name in jobs if name.startswith("generate")}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:  # the first turn compiles and warms up
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{model.name}, float32, {len(ids)} prompt tokens, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    medians = {name: median(times) for name, times in seconds.items()}
    for name, value in medians.items():
        rate = f"{tokens[name] / value:8.1f} tokens/s" if name in tokens else ""
        print(f"{name:44} {value * 1000:9.3f} ms {rate}")
    return medians


def _picture_jobs() -> dict[str, Callable[[], object]]:
    """Pictures of digit-cards through its tower and out of a store, one at a time."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tower, store = load_vision_tower(load_model("digit-cards")), FeatureStore(folder)
    generator = np.random.default_rng(0)
    paths = [f"{folder}/{number}.png" for number in range(PICTURES)]
    for path in paths:
        render(draw_scene(generator, split(held_out=True))).save(path)
    return {
        f"{PICTURES} pictures through the tower": lambda: [tower.features([path]) for path in paths],
        f"{PICTURES} pictures out of the store": lambda: [store.features(tower, [path]) for path in paths],
    }


def _uneven(ids: list[int], table: torch.Tensor) -> list[Prompt]:
    """Sixteen prompts of 20 to 340 tokens, an image-sized range in every other."""
    prompts = []
    for number in range(16):
        long = (ids * 6)[: 20 + (number * 7 % 16) * 64 // 3]
        ranges = [(4, min(len(long), 53))] if number % 2 else []
        prompts.append(Prompt(long, [table[long[a:b]] for a, b in ranges], ranges))
    return prompts


def _padded(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """The ids of all prompts, padded on the right, and their mask: what a padded batch takes."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt.input_ids, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}
