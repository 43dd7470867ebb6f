"""Faults planted on purpose, so that a reader sees what a bug looks like and a test sees that it is caught."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from ..engines.api import Engine, Keep
from ..engines.cancellation import Cancellation
from ..engines.messages import Capabilities, EngineOutput, GenerationConfig
from ..prompt import Prompt
from ..ranges import shift


def off_by_one(prompt: Prompt) -> Prompt:
    """Every range one token late, as when an engine counts a begin-of-sequence token twice."""
    return prompt.replace(embedding_ranges=shift(prompt.embedding_ranges, 1))


def placeholders(prompt: Prompt) -> Prompt:
    """Embeddings swallowed without a word; the placeholder tokens are used."""
    return prompt.replace(input_embeddings=(), embedding_ranges=(), spans=())


def rows_reversed(prompt: Prompt) -> Prompt:
    """The rows of every item in reverse order."""
    return prompt.replace(input_embeddings=[item.flip(0) for item in prompt.input_embeddings])


FAULTS: dict[str, Callable[[Prompt], Prompt]] = {
    "off by one": off_by_one,
    "placeholders used": placeholders,
    "rows reversed": rows_reversed,
}


class FaultyEngine(Engine):
    """An engine that is handed one prompt and computes another."""

    def __init__(self, engine: Engine, fault: Callable[[Prompt], Prompt]) -> None:
        super().__init__()
        self.engine, self.fault = engine, fault
        self.model, self.dtype, self.device = engine.model, engine.dtype, engine.device

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        super().check(prompt, new_tokens)
        super().check(self.fault(prompt), new_tokens)

    def _generate(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        return self.engine._generate(self.fault(prompt), config, cancelled)

    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, keep: Keep) -> None:
        self.engine._trace(self.fault(prompt), taps, positions, keep)
