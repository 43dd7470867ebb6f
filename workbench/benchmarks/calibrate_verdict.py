"""Measure how often the verdict is wrongly "bug", by running an engine without faults on many random prompts.

The largest error of each run, in noise floors, is compared with the verdict's factor. Run it with
`python -m workbench.benchmarks.calibrate_verdict --models smollm2-135m deep --runs 25 --tokens 8 16384`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..comparison.check import check_engine
from ..comparison.local_error import LocalError, local_error
from ..comparison.verdict import FACTOR
from ..engines import open_engine
from ..engines.base import Engine
from ..models import Model, load_model
from ..models.embedding_rows import noise_like
from ..prompt import Prompt
from .random_checkpoint import SHAPES, write_checkpoint


def clean_runs(engine: Engine, runs: int, seed: int = 0, tokens: tuple[int, int] = (8, 160)) -> Iterator[LocalError]:
    """Compare an engine that has no faults with the reference on the prompts of `clean_prompts`; yields accumulated and local errors."""
    for prompt in clean_prompts(engine.model, runs, seed, tokens):
        yield local_error(engine, prompt)


def clean_prompts(model: Model, runs: int, seed: int = 0, tokens: tuple[int, int] = (8, 160)) -> Iterator[Prompt]:
    """Yield `runs` random prompts.

    Half of them are ordinary words in random order, half random ids. Each has one to three items of injected rows, which are drawn from
    the embedding table or are noise of the same norms. Lengths grow from `tokens[0]` to `tokens[1]`, each in its own share of that
    range on a logarithmic scale.
    """
    generator = torch.Generator().manual_seed(seed)
    first, last = tokens
    for run in range(runs):
        share = (run + float(torch.rand((), generator=generator))) / runs
        length = round(first * (last / first) ** share)
        yield random_prompt(model, generator, (length, length), words=run % 2 == 0)


def random_prompt(model: Model, generator: torch.Generator, tokens: tuple[int, int], words: bool) -> Prompt:
    """Return one random prompt as described in `clean_runs`."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    vocab = model.text_config.vocab_size
    length = integer(*tokens)
    pool = model.tokenizer.encode(WORDS, add_special_tokens=False) if words else range(model.text_config.vocab_size)
    ids = [pool[integer(0, len(pool) - 1)] for _ in range(length)]
    items, ranges, position = [], [], 1
    for _ in range(integer(1, 3)):
        start = position + integer(0, length // 4)
        stop = start + integer(1, max(length // 6, 1))
        if stop > length:
            break
        rows = model.token_rows(torch.randint(vocab, (stop - start,), generator=generator).tolist())
        if integer(0, 1):
            rows = noise_like(rows, generator)
        items.append(rows)
        ranges.append((start, stop))
        position = stop
    return Prompt(ids, items, ranges)


WORDS = (
    " the a of and in to is was river mountain winter letter doctor engine bread music seven green slowly bright never always"
    " between under answer question child window paper stone light old new first last went came said gave found kept . , ?"
)


def main() -> None:
    """Print, for each model and dtype, how many runs without faults the verdict would call "bug"; then all as JSON."""
    parser = argparse.ArgumentParser(description="How often the verdict on a clean engine would be 'bug'.")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["smollm2-135m"],
        help=f"names or folders, or {', '.join(SHAPES)}: random weights",
    )
    parser.add_argument("--engine", default="numba")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--runs", type=int, default=70, help="runs per model and dtype")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 100), help="the shortest and the longest prompt")
    parser.add_argument("--device", default="cpu", help="of engine and reference")
    parser.add_argument(
        "--local", action="store_true", help="also the local errors: each layer on the engine's own input"
    )
    parser.add_argument("--json", type=Path, help="a file to which all runs are written")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            model = load_model(write_checkpoint(Path(folder) / name, name) if name in SHAPES else name)
            for dtype in options.dtypes:
                with open_engine(options.engine, model, dtype=dtype, **_placed(options.device)) as engine:
                    runs = [
                        {"model": name, "engine": options.engine, "device": options.device, "dtype": dtype, **run}
                        for run in _ratios(engine, options)
                    ]
                _report(runs)
                results += runs
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"runs": len(results), "alarms": sum(run["accumulated"] > FACTOR for run in results)}))


def _placed(device: str) -> dict[str, Any]:
    return {} if device == "cpu" else {"device": device}


def _ratios(engine: Engine, options: Any) -> Iterator[dict[str, Any]]:
    for prompt in clean_prompts(engine.model, options.runs, options.seed, tuple(options.tokens)):
        began = time.perf_counter()
        local = None
        if options.local:
            both = local_error(engine, prompt, device=options.device)
            accumulated, local = both.accumulated, float(both.local.ratios.max())
        else:
            accumulated = check_engine(engine, prompt, device=options.device)
        found: dict[str, Any] = {
            "tokens": len(prompt),
            "cells": accumulated.ratios.numel(),
            "accumulated": float(accumulated.ratios.max()),
            "verdict": accumulated.verdict,
            "seconds": round(time.perf_counter() - began, 1),
        }
        yield found if local is None else {**found, "local": local}


def _report(runs: list[dict[str, Any]]) -> None:
    for kind in ("accumulated", "local"):
        ratios = [run[kind] for run in runs if kind in run]
        if not ratios:
            continue
        alarms = [ratio for ratio in ratios if ratio > FACTOR]
        lengths = [run["tokens"] for run in runs]
        print(
            f"{runs[0]['model']}, {runs[0]['dtype']}, {min(lengths)} to {max(lengths)} tokens, {kind}: largest ratio of a run "
            f"{median(ratios):.2f} (median), {max(ratios):.2f} (worst); {len(alarms)} of {len(ratios)} above {FACTOR:g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
