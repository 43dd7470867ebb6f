"""Speed of the engines that are installed on this CPU, side by side: `python -m workbench.benchmarks cpu-engines`.

Each engine runs in a process and an environment of its own (`cpu_worker.py`); in every round each does each job once, in turn. Only on
a quiet machine: the threads of llama.cpp and vLLM wait by spinning, so beside another busy process they are many times slower.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from ..atomic_write import atomic_write
from ..engines.environments import ENVIRONMENTS
from ..engines.llama_cpp.gguf_files import gguf_of
from ..errors import ModelError
from ..models import Model, load_model
from ..trace.provenance import versions

JOBS = {
    "first token, 1,024 tokens of which 576 spliced": {"requests": 1, "tokens": 1024, "rows": 576, "new": 1},
    "64 tokens after 64, one request": {"requests": 1, "tokens": 64, "rows": 16, "new": 64},
    "16 requests at once, 64 tokens after 128": {"requests": 16, "tokens": 128, "rows": 64, "new": 64},
    "64 requests at once, 32 tokens after 128": {"requests": 64, "tokens": 128, "rows": 64, "new": 32},
}
_WEIGHTS: Any = {"float32": "f32", "bfloat16": "bf16"}
_WORKER = Path(__file__).with_name("cpu_worker.py")


def run(
    model_name: str, dtype: str, rounds: int, path: Path | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Time all jobs on all engines, print a table, and return all figures; write them to `path` if it is given.

    Args:
        folder: where the embedding table for llama.cpp is written; default: beside its GGUF file.

    Raises:
        ModelError: an engine does not start or fails.
    """
    if dtype not in _WEIGHTS:
        raise ModelError(f"dtype={dtype!r}: this benchmark runs {' and '.join(_WEIGHTS)}")
    model = load_model(model_name)
    workers = {kind: _Worker(kind, command) for kind, command in _commands(model, dtype, folder).items()}
    seconds: dict[str, dict[str, list[float]]] = {job: {kind: [] for kind in workers} for job in JOBS}
    try:
        for worker in workers.values():
            worker.wait()
        for job, sizes in JOBS.items():
            for number in range(rounds + 1):
                for kind, worker in workers.items():
                    taken = worker.time({**sizes, "seed": number})
                    if number:  # the first round compiles, and fills caches
                        seconds[job][kind].append(taken)
            print(_line(job, sizes, seconds[job]), flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    figures = {
        "model": model.name, "dtype": dtype, "rounds": rounds, "processor": processor(), "cores": psutil.cpu_count(logical=False),
        "versions": versions() | {kind: each.installed for kind, each in ENVIRONMENTS.items() if kind in workers}, "seconds": seconds,
    }  # fmt: skip
    if path is not None:
        atomic_write(path, json.dumps(figures, indent=1).encode())
    return figures


def processor() -> str:
    """The processor's name, and its widest vector unit."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t", 1) for line in text.split("\n\n")[0].splitlines() if "\t" in line)
    read = {key: value.strip(" \t:") for key, value in fields.items()}
    flags = set(read.get("flags", "").split())
    widest = next((name for name in ("amx_bf16", "avx512f", "avx2") if name in flags), platform.machine())
    numbers = f"family {read.get('cpu family', '?')}, model {read.get('model', '?')}"
    return f"{read.get('model name', 'unknown')} ({numbers}, {widest})"


def _commands(model: Model, dtype: str, folder: Path | None) -> dict[str, list[str]]:
    """The command of each engine's worker; those that are not installed are left out."""
    threads = str(psutil.cpu_count(logical=False) or 1)
    arguments = [str(model.path), dtype, threads]
    commands = {kind: [sys.executable, str(_WORKER), kind, *arguments] for kind in ("numba", "transformers")}
    for kind, environment in ENVIRONMENTS.items():
        if environment.installed != environment.version:
            print(f"{kind} is not installed: `workbench engines install {kind}`")
            continue
        commands[kind] = [str(environment.python), str(_WORKER), kind, *arguments]
    if "llama-cpp" in commands:
        gguf, _ = gguf_of(model, _WEIGHTS[dtype])
        table = (folder or gguf.parent) / "table.npy"
        if not table.exists():
            np.save(table, model.embedding_table.float().numpy())
        commands["llama-cpp"] += [str(gguf), str(table)]
    return commands


class _Worker:
    """The process of one engine."""

    def __init__(self, kind: str, command: list[str]) -> None:
        self.kind, self.command = kind, " ".join(command)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def wait(self) -> None:
        """Wait until the engine is open."""
        self._read("READY")

    def time(self, job: dict[str, int]) -> float:
        """The seconds of one job."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._read("RESULT "))

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line[len(start) :]
        raise ModelError(
            f"the worker of {self.kind} ended with status {self._process.wait()}: run its command to see why: {self.command}"
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _line(job: str, sizes: dict[str, int], seconds: dict[str, list[float]]) -> str:
    cells = []
    for kind, values in seconds.items():
        middle, spread = median(values), f"{min(values):.2f} to {max(values):.2f} s"
        rate = sizes["requests"] * sizes["new"] / middle
        cells.append(
            f"{kind} {middle:.2f} s ({spread})" if sizes["new"] == 1 else f"{kind} {rate:.0f} tokens/s ({spread})"
        )
    return f"{job}: " + "; ".join(cells)
