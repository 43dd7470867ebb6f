"""One spliced prompt on every engine that is installed: verdict, and the largest error of each tap in noise floors.

Run it with `python -m workbench.benchmarks engines`; it writes data/bench/engines.json, which notebook 10 shows where an engine is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engines import open_engine
from ..errors import ModelError
from ..models import Model, load_model
from ..prompt import Prompt
from ..trace.provenance import versions
from .check import check_engine

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "numba, float32": ("numba", {"dtype": "float32"}),
    "numba, bfloat16": ("numba", {"dtype": "bfloat16"}),
    "vLLM, float32": ("vllm", {"dtype": "float32"}),
    "vLLM, bfloat16": ("vllm", {"dtype": "bfloat16"}),
    "llama.cpp, float32": ("llama-cpp", {"weights": "f32"}),
    "llama.cpp, float32, flash attention": ("llama-cpp", {"weights": "f32", "flash_attention": True}),
    "llama.cpp, bfloat16": ("llama-cpp", {"weights": "bf16"}),
    "llama.cpp, q8_0": ("llama-cpp", {"weights": "q8_0"}),
    "llama.cpp, q4_0": ("llama-cpp", {"weights": "q4_0"}),
}
"""Engines and options by the name that is shown."""


def spliced_question(model: Model) -> Prompt:
    """The question of notebook 01, with the row of " Japan" in place of " France"."""
    ids = model.chat_ids("What is the capital of France? Explain it in two sentences and name a river.")
    at = model.position_of(" France", ids, 5)
    return Prompt(ids, [model.token_rows(model.tokenizer.encode(" Japan")[:1])], [(at, at + 1)])


def judge(model: Model, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Open an engine, compare it with the reference and close it; the answer is made of plain values.

    Raises:
        ModelError: the engine is not installed, or cannot open the model.
    """
    with open_engine(kind, model, **options) as engine:
        found = check_engine(engine, spliced_question(engine.model))
        return {
            "verdict": found.verdict,
            "summary": str(found),
            "version": getattr(engine, "version", versions()["workbench"]),
            "taps": list(found.taps),
            "floors": [round(float(ratio), 3) for ratio in found.ratios.amax(dim=1)],
        }


def run(model_name: str, path: Path) -> dict[str, Any]:
    """Judge every variant whose engine is installed, keep the others as they are in the file, and write it."""
    model = load_model(model_name)
    kept = json.loads(path.read_text(encoding="utf-8"))["variants"] if path.exists() else {}
    for name, (kind, options) in VARIANTS.items():
        try:
            kept[name] = judge(model, kind, options)
        except ModelError as error:
            print(f"{name}: {error}")
            continue
        print(f"{name}: {kept[name]['summary']}", flush=True)
    figures = {"model": model_name, "versions": versions(), "variants": kept}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
