"""How often would the verdict be wrong? Clean engines over many prompts: the largest error in noise floors of each run.

python -m workbench.compare.calibrate --runs 70
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from ..engines import open_engine
from ..engines.api import Engine
from ..injections import noise_like
from ..models import Model, load_model
from ..prompt import Prompt
from .run import check_engine
from .verdict import FACTOR, Comparison


def clean_runs(engine: Engine, runs: int, seed: int = 0, tokens: tuple[int, int] = (8, 160)) -> Iterator[Comparison]:
    """Compare a clean engine with the reference on `runs` random prompts.

    Half of them are ordinary words in random order, half random ids; each has one to three items of injected rows, drawn from the
    embedding table or as noise of the same length. Lengths are uniform in `tokens`.
    """
    generator = torch.Generator().manual_seed(seed)
    for run in range(runs):
        yield check_engine(engine, random_prompt(engine.model, generator, tokens, words=run % 2 == 0))


def random_prompt(model: Model, generator: torch.Generator, tokens: tuple[int, int], words: bool) -> Prompt:
    """One prompt as `clean_runs` describes it."""

    def integer(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

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
    """Command line: false alarms of the verdict over clean runs in three dtypes, as a line each and as JSON."""
    parser = argparse.ArgumentParser(description="How often a clean engine would be called a bug.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=70, help="in each dtype")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 100))
    options = parser.parse_args()
    model = load_model(options.model)
    results: dict[str, Any] = {"model": options.model, "runs": options.runs, "seed": options.seed}
    for dtype in ("float32", "bfloat16", "float16"):
        engine = open_engine("numba", model, dtype=dtype)
        ratios = [
            float(each.ratios.max()) for each in clean_runs(engine, options.runs, options.seed, tuple(options.tokens))
        ]
        alarms = [ratio for ratio in ratios if ratio > FACTOR]
        results[dtype] = {"median": median(ratios), "largest": max(ratios), "alarms": len(alarms)}
        print(
            f"{dtype}: largest ratio of a run {median(ratios):.2f} (median), {max(ratios):.2f} (worst); {len(alarms)} of {len(ratios)} above {FACTOR:g}",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
