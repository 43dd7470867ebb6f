"""Speed of the Numba engine beside Transformers, and of what a slider waits for: `workbench bench`.

Everything is timed in one run, in turns, and the median is reported: only ratios within a run mean something.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from .engines import open_engine
from .engines.messages import GenerationConfig
from .engines.transformers_reference import TransformersReference
from .landing import land
from .models import load_model
from .plots.landing import LandingPicture
from .prompt import Prompt

NEW_TOKENS = 32


def run(model_name: str, rounds: int) -> dict[str, float]:
    """Print a table; return `{job: median seconds}`."""
    model = load_model(model_name)
    engine, reference = open_engine("numba", model), TransformersReference(model)
    ids = model.chat_ids("Tell me a story about a fox and the moon, please. " * 2)[:64]
    prompt = Prompt(ids, [model.embedding_table[ids[30:34]]], [(30, 34)])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    batch = torch.tensor([ids])
    landing, plain = land(engine, prompt)
    picture = LandingPicture(landing)

    def transformers_generate() -> None:
        reference.network.generate(batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    jobs: dict[str, Callable[[], object]] = {
        f"generate {NEW_TOKENS} tokens, numba": lambda: engine.generate(prompt, config),
        f"generate {NEW_TOKENS} tokens, transformers": transformers_generate,
        "trace of every layer, numba": lambda: engine.trace(prompt),
        "trace of every layer, transformers": lambda: reference.trace(prompt),
        "slider: run and compare": lambda: land(engine, prompt, plain),
        "slider: draw": lambda: picture.png(landing),
    }
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
        rate = f"{NEW_TOKENS / value:8.1f} tokens/s" if name.startswith("generate") else ""
        print(f"{name:42} {value * 1000:9.1f} ms {rate}")
    return medians
