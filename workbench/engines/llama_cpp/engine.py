"""llama.cpp as an engine: prompts are fed in runs of ids and rows, and tensors of its graph are read by name."""

from __future__ import annotations

import queue
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import torch

from ...errors import PromptError
from ...models import Model
from ...prompt import Prompt
from ..cancellation import Cancellation
from ..environments import python_of
from ..sampling import generate, stop_tokens
from ..types import Capabilities, EngineOutput, GenerationConfig, ResponseType
from ..worker_engine import WorkerEngine
from .gguf_files import Weights, gguf_of

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "q8_0": torch.bfloat16, "q4_0": torch.bfloat16}
"""The dtype of the noise floor. With quantised weights llama.cpp also quantises activations."""
_WAIT = 0.05  # seconds


class LlamaCppEngine(WorkerEngine):
    """llama.cpp on the CPU, in the environment that `workbench engines install llama-cpp` makes.

    Args:
        weights: of the GGUF file that is written from the checkpoint: "f32", "bf16", "q8_0" or "q4_0". With the last two `model` is a
            checkpoint of the values that the quantised weights stand for, which the reference runs, too.
        flash_attention: with it llama.cpp keeps keys and values in float16, its default; without it in float32.
        context: tokens of the longest sequence; None: the model's, up to 4,096.
        sequences: requests that can be under way at once; others wait, and their streams yield outputs without tokens meanwhile.
        batch: tokens of a pass; longer runs are computed in parts of it.
        threads: None: one for each core. Its threads wait by spinning, so beside another busy process fewer are much faster.
        check: whether prompts are checked before they are passed on.
        patience, start_patience: seconds, see `WorkerEngine`.

    Raises:
        ModelError: llama.cpp is not installed, or the model cannot be written for it.
        EngineDied: its process ended, or did not answer in time.
    """

    def __init__(
        self,
        model: Model,
        *,
        weights: Weights = "f32",
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        flash_attention: bool = False,
        context: int | None = None,
        sequences: int = 8,
        batch: int = 512,
        threads: int | None = None,
        check: bool = True,
        patience: float = 300.0,
        start_patience: float = 300.0,
    ) -> None:
        if str(device) != "cpu":
            raise PromptError(f"device={device!r}: llama.cpp runs on the CPU here")
        if not isinstance(sequences, int) or isinstance(sequences, bool) or sequences < 1:
            raise ValueError(f"sequences={sequences!r}: give an integer of at least 1")
        python = python_of("llama-cpp")
        path, computed = gguf_of(model, weights)
        self.dtype, self.device, self._checks = _DTYPES[weights], torch.device("cpu"), check
        if dtype is not None and str(dtype).removeprefix("torch.") != str(self.dtype).removeprefix("torch."):
            raise ValueError(f"dtype={dtype!r}: llama.cpp computes by its weights ({weights}); choose weights= instead")
        self.weights, self.flash_attention = weights, flash_attention
        self._length = min(computed.context, 4096) if context is None else context
        options = {
            "path": str(path),
            "context": self._length,
            "sequences": sequences + 1,  # sequence 0 is for traces
            "batch": batch,
            "threads": threads or psutil.cpu_count(logical=False) or 1,
            "flash_attention": flash_attention,
        }
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for sequence in range(1, sequences + 1):
            self._free.put(sequence)
        super().__init__(
            "llama-cpp",
            computed,
            python,
            Path(__file__).with_name("worker.py"),
            options,
            patience=patience,
            start_patience=start_patience,
        )
        self.version = str(self.ready["version"])

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "llama-cpp", tuple(self.ready["taps"]), ("float32", "bfloat16"), ("cpu",), bidirectional_spans=False
        )

    def check(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """See `Engine.check`; with `check=False` only whether the engine is open."""
        if not self._checks:
            self._check_usable()
            return
        super().check(prompt, new_tokens)
        if prompt.position_ids is not None and not torch.equal(prompt.position_ids, torch.arange(len(prompt))):
            raise PromptError("this adapter gives llama.cpp the positions 0, 1, 2, ...: leave position_ids out")
        if len(prompt) + new_tokens > self._length:
            raise PromptError(
                f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed context={self._length}: open the engine with a larger one"
            )

    def sampling(self, config: GenerationConfig) -> dict[str, Any]:
        return {}  # tokens are chosen here, from llama.cpp's logits

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        while True:
            try:
                sequence = self._free.get(timeout=_WAIT)
                break
            except queue.Empty:
                if cancelled.is_set():
                    return
                # Not waited for here: the thread may be one that another stream needs to end.
                yield EngineOutput(ResponseType.SUCCESS)
        try:
            yield from generate(_Run(self, prompt, sequence), prompt, config, stop_tokens(self.model, config))
        finally:
            try:
                self.ask({"what": "free", "sequence": sequence}, {})
            finally:
                self._free.put(sequence)


class _Run:
    """A request, of which one token is run at a time."""

    def __init__(self, engine: LlamaCppEngine, prompt: Prompt, sequence: int) -> None:
        self._engine, self._prompt, self._sequence, self._position = engine, prompt, sequence, len(prompt)

    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        fields, tensors = self._engine.request_fields(self._prompt)
        states = self._engine.ask(
            {"what": "prefill", "sequence": self._sequence, "every": all_logits, **fields}, tensors
        )
        return states["logits"], states["norm"]

    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        request = {"what": "decode", "sequence": self._sequence, "position": self._position, "token": token}
        self._position += 1
        states = self._engine.ask(request, {})
        return states["logits"], states["norm"]
