"""The two ways from pictures to an answer, side by side: tower first and embeddings then, or everything in one engine."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..engines import open_engine
from ..engines.api import Engine
from ..engines.messages import GenerationConfig
from ..memory import PeakMemory, in_words
from ..models import Model
from ..prompt import Prompt
from .build import build_multimodal, build_prompt
from .checkpoint import Checkpoint
from .images import Picture
from .sources import FolderSource
from .tower import load_vision_tower
from .vision_part import is_language


@dataclass(frozen=True)
class Flow:
    """What one way took; times in seconds, memory in bytes above what the process held before.

    Attributes:
        features_seconds: processing the pictures and, with two engines, running the tower.
        first_token_seconds: from the prompt to the first token; with one engine the tower runs here.
        peak_bytes: the highest at any time, tower and engine in one process.
        vision_bytes, language_bytes: of the weights in float32; with two engines they can lie on two machines.
    """

    name: str
    answer: str
    load_seconds: float
    features_seconds: float
    first_token_seconds: float
    answer_seconds: float
    peak_bytes: int
    vision_bytes: int
    language_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.vision_bytes + self.language_bytes


def compare_flows(
    model: Model, question: str, images: Sequence[Picture], *, kind: str = "transformers", max_new_tokens: int = 24
) -> tuple[Flow, Flow]:
    """Ask a question both ways, one after the other in this process.

    Args:
        kind: the language engine of the first way.

    Returns:
        the way with two engines, and the way with one.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    vision, language = _weight_bytes(model)
    flows = []
    for name, opened, build in (
        (f"tower, then {kind}", kind, build_prompt),
        ("vision inside", "transformers-multimodal", build_multimodal),
    ):
        gc.collect()
        with PeakMemory() as peak:
            started = time.perf_counter()
            tower, engine = (
                load_vision_tower(model),
                open_engine(opened, model),
            )  # the second way needs its processor alone
            loaded = time.perf_counter()
            prompt = build(model, question, images, tower=tower)
            built = time.perf_counter()
            answer, first, done = _answer(model, engine, prompt, config)
            del tower, engine
        flows.append(Flow(name, answer, loaded - started, built - loaded, first, done, peak.bytes, vision, language))
    return flows[0], flows[1]


def flows_table(flows: Sequence[Flow]) -> str:
    """Flows as text, one a column."""
    rows = {
        "answer": [flow.answer for flow in flows],
        "weights": [in_words(flow.weight_bytes) for flow in flows],
        "of them vision": [in_words(flow.vision_bytes) for flow in flows],
        "peak memory": [in_words(flow.peak_bytes) for flow in flows],
        "loading": [f"{flow.load_seconds * 1000:.0f} ms" for flow in flows],
        "pictures": [f"{flow.features_seconds * 1000:.0f} ms" for flow in flows],
        "first token": [f"{flow.first_token_seconds * 1000:.0f} ms" for flow in flows],
        "whole answer": [f"{flow.answer_seconds * 1000:.0f} ms" for flow in flows],
    }
    head = f"{'':16}" + "".join(f"{flow.name:26}" for flow in flows)
    return "\n".join(
        [head, *(f"{name:16}" + "".join(f"{value:26}" for value in values) for name, values in rows.items())]
    )


def _answer(model: Model, engine: Engine, prompt: Prompt, config: GenerationConfig) -> tuple[str, float, float]:
    """The answer, and seconds to its first token and to its end."""
    started = time.perf_counter()
    tokens: list[int] = []
    first = 0.0
    for output in engine.stream(prompt, config):
        if output.token_ids and not tokens:
            first = time.perf_counter() - started
        tokens += output.token_ids
    return model.tokenizer.decode(tokens), first, time.perf_counter() - started


def _weight_bytes(model: Model) -> tuple[int, int]:
    """Bytes of the vision and of the language weights in float32, by the checkpoint's headers."""
    checkpoint = Checkpoint(FolderSource(model.path))
    sizes = {True: 0, False: 0}
    for name, entry in checkpoint.entries(checkpoint).items():
        sizes[is_language(name)] += 4 * prod(entry.shape)
    return sizes[False], sizes[True]
