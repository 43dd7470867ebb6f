"""The GPU's kernels in one decode step of the Numba engine: `python -m workbench.benchmarks timeline --device cuda --model PATH`."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..engines import open_engine
from ..engines.types import GenerationConfig
from ..models import load_model
from ..trace.provenance import versions
from .serving import PROMPTS, spliced_prompt

KINDS = {
    "copy": ("Memcpy", "Memset"),
    "attention": ("decode", "attend", "prefill", "combine"),
    "norm, rotary, gate": ("norm", "rotate", "gate"),
    "product": ("row_product", "gemm", "nvjet", "cutlass", "cublas", "splitK"),
}
"""Words in the names of kernels; any other kernel is "embedding, choice, other"."""


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next(
        (kind for kind, words in KINDS.items() if any(word in name for word in words)), "embedding, choice, other"
    )


def run(model_name: str, dtype: str, batch: int, file: Path | None) -> dict[str, Any]:
    """Record decode steps of `batch` requests at once; print the time by kind of kernel of a typical one, write and return it.

    A step begins with the copy of its inputs. The typical one has the median duration.
    """
    from torch.profiler import ProfilerActivity, profile

    model = load_model(model_name)
    prompts = [spliced_prompt(model, *PROMPTS[0], seed=seed) for seed in range(batch)]
    config = GenerationConfig(max_new_tokens=400, ignore_eos=True)
    options: dict[str, Any] = {
        "cache_max_entry_count": 0.5,
        "max_prefill_token_num": 8192,
        "enable_prefix_caching": False,
    }
    with open_engine("numba", model, dtype=dtype, device="cuda", max_batch_size=batch, **options) as engine:
        generate = engine.generate
        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(lambda prompt: generate(prompt, config), prompts))  # captures the graphs
        worker = threading.Thread(target=_generate_all, args=(engine, prompts, config))
        worker.start()
        try:
            while worker.is_alive() and (engine.stats().tokens_per_second == 0 or engine.stats().waiting):  # type: ignore[attr-defined]
                threading.Event().wait(0.05)
            threading.Event().wait(0.5)
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                threading.Event().wait(0.15)
                torch.cuda.synchronize()
        finally:
            worker.join()
    events = sorted(
        (each.time_range.start, each.time_range.end - each.time_range.start, each.name)
        for each in recorded.events() or []
        if each.device_type.name == "CUDA"
    )
    starts = [number for number, (_, _, name) in enumerate(events) if "HtoD" in name]
    steps = [events[a:b] for a, b in pairwise(starts)]
    whole = [step for step in steps if len(step) == max(map(len, steps), default=0)]
    if not whole:
        raise RuntimeError(
            f"{len(events)} kernels and {len(steps)} steps were recorded: the profiler saw no decode step"
        )
    whole.sort(key=lambda step: step[-1][0] - step[0][0])
    step = whole[len(whole) // 2]
    began = step[0][0]
    kernels = [(round(start - began, 2), round(length, 2), kind_of(name), name[:60]) for start, length, name in step]
    report: dict[str, Any] = {
        "model": Path(model_name).name, "dtype": dtype, "batch": batch, "device": torch.cuda.get_device_name(), "versions": versions(),
        "steps recorded": len(steps),
        "kernels": kernels,
    }  # fmt: skip
    for kind in {each[2] for each in kernels}:
        lengths = [each[1] for each in kernels if each[2] == kind]
        print(f"{kind:26} {len(lengths):4} kernels {sum(lengths):9.1f} us")
    if file is not None:
        file.write_text(json.dumps(report, indent=None, separators=(",", ":")) + "\n")
    return report


def _generate_all(engine: Any, prompts: Any, config: GenerationConfig) -> None:
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: engine.generate(prompt, config), prompts))
