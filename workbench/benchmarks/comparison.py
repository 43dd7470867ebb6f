"""Time comparing traces (relative to reading their files), tracing (relative to a plain prefill), and lint.

Run it with `python -m workbench.benchmarks comparison`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from range_kernels.benchmarks.harness import time_interleaved

from ..comparison import NoiseFloor, compare
from ..engines import open_engine
from ..linting import lint
from ..models import load_model
from ..prompt import Prompt
from ..trace import Trace
from ..trace.files import TraceWriter
from ..trace.taps import EVERY_TAP
from .peak_memory import PeakMemory, anonymous_memory

LAYERS, POSITIONS, WIDTH = 32, 2048, 2048


def run(model_name: str, rounds: int) -> dict[str, float]:
    """Time all jobs, print a table with the targets, and return `{job: median seconds}`."""
    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder:
        jobs = {**_traces(Path(folder)), **_recording(model_name, Path(folder))}
        before = anonymous_memory()
        peak = PeakMemory()
        with peak:
            jobs["compare two traces"]()
        seconds = time_interleaved(jobs, rounds)
    for name, value in seconds.items():
        print(f"{name:52} {value * 1000:10.2f} ms")
    reading = seconds["read two traces into memory"]
    print(f"comparing / reading into memory: {seconds['compare two traces'] / reading:.2f} (target: at most 1.5)")
    print(
        f"additional memory while comparing: {(peak.bytes - before) / 2**20:.0f} MiB; one tap is {POSITIONS * WIDTH * 8 / 2**20:.0f} MiB"
    )
    print(f"all taps / plain prefill: {seconds['prefill, all taps'] / seconds['prefill']:.2f} (target: at most 2)")
    print(f"lint: {seconds['lint, 4096 tokens, 8 images'] * 1000:.1f} ms (target: under 5)")
    return seconds


def _traces(folder: Path) -> dict[str, Callable[[], object]]:
    """Write two traces of 32 taps x 2,048 x 2,048, float64 and float32; return jobs that read and compare them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{number}": (POSITIONS, WIDTH) for number in range(LAYERS)}
    positions = torch.arange(POSITIONS)
    record: dict[str, Any] = {
        "engine": "bench", "model": "bench", "model_digest": "", "device": "cpu", "prompt": "", "tokens": POSITIONS,
        "ranges": [[100, 676]], "modalities": ["image"], "versions": {},
    }  # fmt: skip
    paths = {"float64": folder / "reference.safetensors", "float32": folder / "run.safetensors"}
    state = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    for name, path in paths.items():
        dtype = getattr(torch, name)
        with TraceWriter(path, shapes, dtype, positions, {**record, "dtype": name}) as writer:
            for tap in shapes:
                writer.write(tap, state.to(dtype))
    error = torch.full((POSITIONS,), 6e-8, dtype=torch.float64)
    floor = NoiseFloor(
        dict.fromkeys(shapes, error),
        dict.fromkeys(shapes, ""),
        positions,
        {**record, "dtype": "float32"},
        dict.fromkeys(shapes, 1e-6),
    )

    def read() -> None:
        for path in paths.values():
            path.read_bytes()

    def scan() -> None:
        buffer = bytearray(1 << 24)
        for path in paths.values():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def both() -> None:
        result = compare(Trace.load(paths["float64"]), Trace.load(paths["float32"]), floor=floor)
        assert result.verdict == "noise", str(result)

    return {"read two traces into memory": read, "scan two traces through 16 MiB": scan, "compare two traces": both}


def _recording(model_name: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Return jobs that trace the Numba engine and lint a prompt."""
    model = load_model(model_name)
    engine = open_engine("numba", model)
    generator = torch.Generator().manual_seed(0)
    vocab, hidden = model.text_config.vocab_size, model.text_config.hidden_size
    ids = torch.randint(5, vocab, (256,), generator=generator).tolist()
    prompt = Prompt(ids, [model.token_rows(ids[30:80])], [(30, 80)])
    long = torch.randint(5, vocab, (4096,), generator=generator).tolist()
    images = [torch.randn(256, hidden, generator=generator) * 0.1 for _ in range(8)]
    many = Prompt(long, images, [(100 + 480 * number, 356 + 480 * number) for number in range(8)])
    every = [tap for tap in EVERY_TAP if tap != "logits"]
    return {
        "prefill": lambda: engine.trace(prompt, ["norm"], [-1]),
        "prefill, all taps": lambda: engine.trace(prompt, every),
        "prefill, all taps, to disk": lambda: engine.trace(prompt, every, path=folder / "all.safetensors"),
        "lint, 4096 tokens, 8 images": lambda: lint(many, model, "turbomind", dtype="bfloat16"),
    }
