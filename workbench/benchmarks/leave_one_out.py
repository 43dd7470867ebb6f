"""What each optimisation of the Numba engine brings on a GPU: each is taken out alone, and speeds are measured in turn.

Run it with `python -m workbench.benchmarks leave-one-out --model PATH --rounds 3`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..engines import open_engine
from ..engines.numba_engine import ops
from ..engines.numba_engine.model_runner import ModelRunner
from ..engines.numba_engine.scheduler import Scheduler
from ..engines.types import GenerationConfig
from ..models import Model, load_model
from ..trace.provenance import versions
from .serving import NEW_TOKENS, PROMPTS, _generate_together, _seconds, spliced_prompt

BATCHES = (1, 16, 64)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


WITHOUT: dict[str, tuple[Callable[[], contextlib.AbstractContextManager], dict[str, Any]]] = {
    "nothing": (contextlib.nullcontext, {}),
    "CUDA graphs": (contextlib.nullcontext, {"eager_mode": True}),
    "steps launched ahead": (lambda: _replaced(Scheduler, "ahead", lambda scheduler, chunks: []), {}),
    "tokens chosen on the GPU": (lambda: _replaced(ModelRunner, "launch", lambda *arguments: None), {}),
    "sum and norm in one kernel": (lambda: _replaced(ops.GpuOperations, "add", ops._Plain.add), {}),
    "rotation and cache write in one kernel": (
        lambda: _replaced(ops.GpuOperations, "position", ops._Plain.position),
        {},
    ),
    "gated activation in one kernel": (lambda: _replaced(ops.GpuLinear, "of_gate", ops.TorchLinear.of_gate), {}),
}
"""By optimisation, how it is taken out, and options of the engine that do it."""


def run(model_name: str, rounds: int = 3, path: Path | None = None) -> dict[str, Any]:
    """Measure with each optimisation taken out, in `rounds` rounds of all of them; print a table and return all figures."""
    model = load_model(model_name)
    figures: dict[str, Any] = {
        "model": model_name, "dtype": "bfloat16", "rounds": rounds, "device": torch.cuda.get_device_name(),
        "versions": versions(), "without": {name: {} for name in WITHOUT},
    }  # fmt: skip
    for _ in range(rounds):
        for name, (change, options) in WITHOUT.items():
            with change(), open_engine(
                "numba", model, dtype="bfloat16", device="cuda", max_batch_size=max(BATCHES), cache_max_entry_count=0.5,
                enable_prefix_caching=False, max_prefill_token_num=8192, **options,
            ) as engine:  # fmt: skip
                for what, value in _measure(engine, model):
                    figures["without"][name].setdefault(what, []).append(value)
            torch.cuda.empty_cache()
            if path is not None:
                path.write_text(json.dumps(figures, indent=1) + "\n")
    print(_table(figures))
    return figures


def _measure(engine: Any, model: Model) -> Iterator[tuple[str, float]]:
    one = GenerationConfig(max_new_tokens=1, ignore_eos=True)
    tokens, images = PROMPTS[0]
    prompt = spliced_prompt(model, tokens, images)
    for _ in range(3):  # compiles, fills caches, raises clocks
        engine.generate(prompt, one)
    yield "first token, ms", 1e3 * median(_seconds(engine.generate, prompt, one) for _ in range(5))
    for batch in BATCHES:
        prompts = [spliced_prompt(model, tokens, images, seed=seed) for seed in range(batch)]
        _generate_together(engine, prompts, 4 + NEW_TOKENS, {})  # captures
        few, many = (_seconds(_generate_together, engine, prompts, count, {}) for count in (4, 4 + NEW_TOKENS))
        yield f"decode at {batch}, tokens/s", batch * NEW_TOKENS / (many - few)


def _table(figures: dict[str, Any]) -> str:
    columns = list(next(iter(figures["without"].values())))
    lines = [f"{'without':40s}" + "".join(f"{column:>30s}" for column in columns)]
    whole = figures["without"]["nothing"]
    for name, measured in figures["without"].items():
        cells = []
        for column in columns:
            values = measured[column]
            change = median(values) / median(whole[column]) - 1
            cells.append(f"{median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f}) {change:+.0%}")
        lines.append(f"{name:40s}" + "".join(f"{cell:>30s}" for cell in cells))
    return "\n".join(lines)
