"""Time and memory of a verdict on a large model, the weights of whose reference are streamed: `python -m workbench.benchmarks streamed`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..comparison import check_engine, compare, reference_cache
from ..comparison.verdict import Comparison
from ..engines import open_engine
from ..engines.freed_memory import return_freed_memory
from ..engines.transformers.streamed_weights import StreamedWeights
from ..models import Model, load_model
from ..prompt import Prompt
from ..trace import Trace
from ..trace.provenance import versions
from ..trace.taps import EVERY_TAP
from .peak_memory import PeakMemory
from .random_checkpoint import write_checkpoint
from .serving import spliced_prompt


def run(shape: str, dtype: str, device: str, tokens: int, folder: str | None = None) -> dict[str, Any]:
    """Write a random checkpoint, open the Numba engine on it, and measure `check_engine`; print and return the figures.

    Args:
        shape: a key of `random_checkpoint.SHAPES`.
        tokens: length of the prompt; from 600 on 576 of them are injected rows.
        folder: where the checkpoint is written, or was; None: a temporary folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / shape
        began = time.perf_counter()
        if not (path / "config.json").exists():
            write_checkpoint(path, shape, device)
        written = time.perf_counter() - began
        model = load_model(str(path))
        began = time.perf_counter()
        _ = model.digest
        figures: dict[str, Any] = {
            "shape": shape, "dtype": dtype, "device": _device(device), "tokens": tokens, "versions": versions(),
            "checkpoint_bytes": model.weights.total_bytes(), "written_s": written, "digest_s": time.perf_counter() - began,
        }  # fmt: skip
        prompt = spliced_prompt(model, tokens, 1 if tokens >= 600 else 0)
        options: dict[str, Any] = {"cache_max_entry_count": 0.02} if device == "cuda" else {}
        with open_engine("numba", model, dtype=dtype, device=device, **options) as engine:
            if device == "cuda":
                figures |= _measured(lambda: check_engine(engine, prompt, device=device, streamed=True), device)
            else:
                run = engine.trace(prompt, EVERY_TAP)
        if device != "cuda":  # what the reference needs: the engine, which needs more, is closed
            del engine
            return_freed_memory()
            figures |= _measured(lambda: _judge(model, prompt, run, dtype), device)
    print(json.dumps(figures, indent=1))
    return figures


def _judge(model: Model, prompt: Prompt, run: Trace, dtype: str) -> Comparison:
    expected, floor = reference_cache.reference_run(model, prompt, dtype, list(run), streamed=True)
    return compare(expected, run, floor=floor)


def _measured(judge: Callable[[], Comparison], device: str) -> dict[str, Any]:
    """Verdict, seconds, the share of them that reading takes, and peaks of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with _Reading() as reading, PeakMemory() as memory:
        began = time.perf_counter()
        comparison = judge()
        seconds = time.perf_counter() - began
    gpu = {"gpu_peak_bytes": torch.cuda.max_memory_reserved()} if device == "cuda" else {}
    reference_cache.forget()
    return {
        "verdict": str(comparison),
        "seconds": seconds,
        "reading_share": reading.seconds / seconds,
        "host_peak_bytes": memory.bytes,
        **gpu,
    }


class _Reading:
    """Counts the time that streamed weights take to be read, cast and moved to the device."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _Reading:
        self._own = StreamedWeights._read
        counter = self

        def read(weights: StreamedWeights, unit: str) -> dict[str, Any]:
            began = time.perf_counter()
            found = counter._own(weights, unit)
            if weights._device.type == "cuda":
                torch.cuda.synchronize()
            counter.seconds += time.perf_counter() - began
            return found

        StreamedWeights._read = read  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        StreamedWeights._read = self._own  # type: ignore[method-assign]


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
