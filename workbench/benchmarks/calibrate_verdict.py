"""Measure how often the verdict is wrongly "bug", by running an engine without faults on many random prompts.

The largest error of each run, in noise floors, is compared with the verdict's factor. Run it with
`python -m workbench.benchmarks.calibrate_verdict --runs 70`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from ..comparison.local_error import LocalError, local_error
from ..comparison.verdict import FACTOR
from ..engines import open_engine
from ..engines.base import Engine
from ..models import Model, load_model
from ..models.embedding_rows import noise_like
from ..prompt import Prompt


def clean_runs(engine: Engine, runs: int, seed: int = 0, tokens: tuple[int, int] = (8, 160)) -> Iterator[LocalError]:
    """Compare an engine that has no faults with the reference on `runs` random prompts; yields accumulated and local errors.

    Half of the prompts are ordinary words in random order, half random ids. Each has one to three items of injected
    rows, which are drawn from the embedding table or are noise of the same norms. Lengths are uniform from `tokens[0]`
    to `tokens[1]`.
    """
    generator = torch.Generator().manual_seed(seed)
    for run in range(runs):
        yield local_error(engine, random_prompt(engine.model, generator, tokens, words=run % 2 == 0))


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
    """Print, for three dtypes, how many runs without faults the verdict would call "bug"; then all as JSON."""
    parser = argparse.ArgumentParser(description="How often the verdict on a clean engine would be 'bug'.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=70, help="runs per dtype")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 100))
    options = parser.parse_args()
    model = load_model(options.model)
    results: dict[str, Any] = {"model": options.model, "runs": options.runs, "seed": options.seed}
    for dtype in ("float32", "bfloat16", "float16"):
        engine = open_engine("numba", model, dtype=dtype)
        pairs = [
            (float(each.accumulated.ratios.max()), float(each.local.ratios.max()))
            for each in clean_runs(engine, options.runs, options.seed, tuple(options.tokens))
        ]
        results[dtype] = {}
        for kind, ratios in zip(("accumulated", "local"), zip(*pairs, strict=True), strict=True):
            alarms = [ratio for ratio in ratios if ratio > FACTOR]
            results[dtype][kind] = {"median": median(ratios), "largest": max(ratios), "alarms": len(alarms)}
            print(
                f"{dtype} {kind}: largest ratio of a run {median(ratios):.2f} (median), {max(ratios):.2f} (worst); "
                f"{len(alarms)} of {len(ratios)} above {FACTOR:g}",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
