"""Compare two pipelines from images to an answer: a separate vision tower and a language engine, or one engine that runs both."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..engines import open_engine
from ..engines.base import Engine
from ..engines.types import GenerationConfig
from ..models import Model
from ..models.checkpoint import Checkpoint
from ..models.sources import FolderSource
from ..prompt import Prompt
from ..vision.images import ImageLike
from ..vision.peak_memory import PeakMemory, in_words
from ..vision.prompt_builder import build_multimodal, build_prompt
from ..vision.tower import load_vision_tower
from ..vision.tower_weights import is_language


@dataclass(frozen=True)
class Pipeline:
    """The answer and the cost of one pipeline. Times are wall-clock seconds.

    Attributes:
        load_seconds: opening tower and engine.
        features_seconds: building the prompt: processing the images and, in the first pipeline, running the tower.
        first_token_seconds: from the start of generation to the first token; in the second pipeline the tower runs in this time.
        answer_seconds: from the start of generation to the end of the answer.
        peak_bytes: peak memory above the process's memory before, with tower and engine in one process.
        vision_bytes, language_bytes: size of the weights in float32; in the first pipeline they can be on two machines.
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
        """Size of all weights in float32."""
        return self.vision_bytes + self.language_bytes


def compare_pipelines(
    model: Model, question: str, images: Sequence[ImageLike], *, kind: str = "transformers", max_new_tokens: int = 24
) -> tuple[Pipeline, Pipeline]:
    """Answer a question with both pipelines, one after the other in this process.

    Args:
        kind: the language engine of the first pipeline, as in `open_engine`; the second runs "transformers-multimodal".
        max_new_tokens: limit of the answer's length.

    Returns:
        the pipeline with a separate tower, and the one with a single engine.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    vision, language = _weight_bytes(model)
    pipelines = []
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
            )  # the second pipeline uses only the tower's processor
            loaded = time.perf_counter()
            prompt = build(model, question, images, tower=tower)
            built = time.perf_counter()
            answer, first, done = _answer(model, engine, prompt, config)
            del tower, engine
        pipelines.append(
            Pipeline(name, answer, loaded - started, built - loaded, first, done, peak.bytes, vision, language)
        )
    return pipelines[0], pipelines[1]


def pipelines_table(pipelines: Sequence[Pipeline]) -> str:
    """Format pipelines as a text table, one column per pipeline."""
    rows = {
        "answer": [pipeline.answer for pipeline in pipelines],
        "weights": [in_words(pipeline.weight_bytes) for pipeline in pipelines],
        "of which vision": [in_words(pipeline.vision_bytes) for pipeline in pipelines],
        "peak memory": [in_words(pipeline.peak_bytes) for pipeline in pipelines],
        "loading": [f"{pipeline.load_seconds * 1000:.0f} ms" for pipeline in pipelines],
        "images": [f"{pipeline.features_seconds * 1000:.0f} ms" for pipeline in pipelines],
        "first token": [f"{pipeline.first_token_seconds * 1000:.0f} ms" for pipeline in pipelines],
        "whole answer": [f"{pipeline.answer_seconds * 1000:.0f} ms" for pipeline in pipelines],
    }
    head = f"{'':16}" + "".join(f"{pipeline.name:26}" for pipeline in pipelines)
    return "\n".join(
        [head, *(f"{name:16}" + "".join(f"{value:26}" for value in values) for name, values in rows.items())]
    )


def _answer(model: Model, engine: Engine, prompt: Prompt, config: GenerationConfig) -> tuple[str, float, float]:
    """Return the answer, and the seconds to its first token and to its end."""
    started = time.perf_counter()
    tokens: list[int] = []
    first = 0.0
    for output in engine.stream(prompt, config):
        if output.token_ids and not tokens:
            first = time.perf_counter() - started
        tokens += output.token_ids
    return model.tokenizer.decode(tokens), first, time.perf_counter() - started


def _weight_bytes(model: Model) -> tuple[int, int]:
    """Bytes of the vision and of the language weights in float32, from the checkpoint's headers."""
    checkpoint = Checkpoint(FolderSource(model.path))
    sizes = {True: 0, False: 0}
    for name, entry in checkpoint.entries(checkpoint).items():
        sizes[is_language(name)] += 4 * prod(entry.shape)
    return sizes[False], sizes[True]
