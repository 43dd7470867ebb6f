"""Run the sweep: `python -m tests.sweep [CLASS ...]` prints an outcome per class; `--write` writes data/coverage.md."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import transformers

from . import multimodal
from .outcome import Outcome, judge
from .small_configs import causal_classes, multimodal_classes, multimodal_types

TABLE = Path(__file__).parents[2] / "data" / "coverage.md"


def main() -> int:
    """Return 1 if a class is wrong or raises a foreign error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes, began = [], time.perf_counter()
    for name, model_type in sorted({**causal_classes(), **multimodal_classes()}.items()):
        if not chosen.classes or name in chosen.classes:
            outcomes.append(judge(name, model_type))
            print(f"{outcomes[-1].kind:9} {name}: {outcomes[-1].detail[:300]}", flush=True)
    families = []
    for model_type, name in sorted(multimodal_types().items()):
        if not chosen.classes or model_type in chosen.classes:
            outcome = multimodal.judge(name, model_type)
            families.append(Outcome(model_type, outcome.kind, outcome.detail))
            print(f"{outcome.kind:9} {model_type}: {outcome.detail[:300]}", flush=True)
    counts = collections.Counter(each.kind for each in [*outcomes, *families])
    print(f"{dict(counts)} in {time.perf_counter() - began:.0f} s")
    if chosen.write:
        TABLE.write_text(_table(outcomes, families), encoding="utf-8")
    return int(counts["wrong"] + counts["raw"] > 0)


def _rows(outcomes: list[Outcome], width: int) -> str:
    return "\n".join(f"| {each.name} | {each.kind} | {each.detail.replace('|', '/')[:width]} |" for each in outcomes)


def _counted(outcomes: list[Outcome]) -> str:
    counts = collections.Counter(each.kind for each in outcomes)
    return f"{', '.join(f'{kind}: {count}' for kind, count in counts.most_common())}, of {len(outcomes)}"


def _table(outcomes: list[Outcome], families: list[Outcome]) -> str:
    return f"""# Multimodal types, from a checkpoint's files to a prompt

Written by `make sweep` with Transformers {transformers.__version__}. Each type was built small, with random weights, a tokenizer and its own
processor. `load_vision_tower` and `build_prompt` were given one and two images, videos and sounds; rows were compared bit for bit with
those of the whole model, and logits of the spliced prompt on the reference with the class's own forward with pixels (relative 1e-5).
"Numba engine": that engine opens it too, and its states of these prompts equal those of the reference (relative 5e-5).
"Refused" is an error by name, "not built": a package is missing, or Transformers has no processor.

{_counted(families)} types.

| type | outcome | |
|---|---|---|
{_rows(families, 300)}

# Model classes and the reference

Written by `make sweep` with Transformers {transformers.__version__}. Each class for causal language modelling was built small and with
random weights; states, logits, sums of attention and MLP, logits with injected rows and greedy tokens of the reference were compared with
the class's own forward, in float32 and float64; and states and noise floors with streamed weights, interrupted runs included, with those
of weights in memory, bit for bit ("not streamed": refused by name). "Refused" is an error by name; "not built": the sweep has no small configuration for it.

{_counted(outcomes)} classes.

| class | outcome | |
|---|---|---|
{_rows(outcomes, 200)}
"""


if __name__ == "__main__":
    sys.exit(main())
