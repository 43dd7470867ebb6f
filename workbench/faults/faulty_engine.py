"""An engine that computes a changed version of every prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from ..engines.base import Engine, Sink
from ..engines.cancellation import Cancellation
from ..engines.types import Capabilities, EngineOutput, GenerationConfig
from ..prompt import Prompt
from ..trace.patch import Patches


class FaultyEngine(Engine):
    """Wraps `engine`, and passes `change(prompt)` to it instead of each prompt.

    The prompt and the changed one must both pass `Engine.check`. Closing the wrapper leaves `engine` open.
    """

    def __init__(self, engine: Engine, change: Callable[[Prompt], Prompt]) -> None:
        super().__init__()
        self.engine, self.change = engine, change
        self.model, self.dtype, self.device = engine.model, engine.dtype, engine.device

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        super().check(prompt, new_tokens)
        super().check(self.change(prompt), new_tokens)

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        yield from self.engine.run_generation(self.change(prompt), config, cancelled)

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        self.engine.run_trace(self.change(prompt), taps, positions, sink)

    def run_patched(
        self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink, patches: Patches
    ) -> None:
        self.engine.run_patched(self.change(prompt), taps, positions, sink, patches)
