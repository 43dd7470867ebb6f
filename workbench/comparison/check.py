"""Run an engine and the reference on one prompt and compare their traces."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..engines.base import Engine
from ..engines.function_engine import require_engine
from ..models.cache import cache_folder
from ..progress import Progress, part
from ..prompt import Prompt
from ..trace import Trace
from ..trace.taps import EVERY_TAP, select_taps
from .doubt import compare_with_doubt
from .floor_runs import reference_runs
from .noise_floor import NoiseFloor
from .reference_cache import reference_pair, reference_run
from .reference_pass import ReferencePass
from .reference_work import FLOOR_RUNS
from .verdict import FACTOR, Comparison

ROOM = 2 << 30
"""Bytes of states that a verdict keeps in memory; with more, both runs are written to files while they are compared."""


def check_engine(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str] = EVERY_TAP,
    positions: slice | Sequence[int] = slice(None),
    factor: float = FACTOR,
    device: str = "cpu",
    progress: Progress | None = None,
    streamed: bool | None = None,
) -> Comparison:
    """Compare an engine's hidden states on one prompt with those of the reference, Transformers.

    The reference runs once in float64, and four times in the engine's dtype to measure its rounding error, the noise floor; sixteen times
    if a verdict "bug" would be doubtful (`doubt.py`). The engine runs once. See `compare` for the verdict. States of more than 2 GB are
    kept in files in the cache folder while they are compared, and the size is printed before.

    Args:
        taps: names or patterns of the hidden states to compare. A pattern that matches no tap of the engine is skipped if another
            one matches.
        positions: the prompt positions to compare.
        factor: largest error that counts as rounding noise, as a multiple of the noise floor.
        device: the reference's device, "cpu" or "cuda".
        progress: called with the fraction done; an exception that it raises stops the run.
        streamed: whether the reference's weights are read layer by layer, each layer once for all five runs, so that memory for one
            layer is enough; None: if they do not fit into memory, and on the CPU if they take more than 256 MB.

    Raises:
        EmbeddingRangeError, PromptError: the engine cannot run the prompt.
        ModelError: the reference cannot be loaded, or not streamed.
        ValueError: no pattern matches a tap of the engine, a position outside the prompt, or a factor below 1.
        TraceError: the states do not fit into memory, or contain NaN in the reference.
    """
    require_engine(engine, "check_engine")
    chosen = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))
    size = states_bytes(engine, prompt, chosen, positions)
    check = _Check(engine, prompt, chosen, positions, factor, device, progress, streamed)
    return check.in_files(size) if size > ROOM else check.in_memory()[0]


def check_with_traces(
    engine: Engine,
    prompt: Prompt,
    progress: Progress | None = None,
    *,
    factor: float = FACTOR,
    device: str = "cpu",
    streamed: bool | None = None,
    taps: Sequence[str] = EVERY_TAP,
) -> tuple[Comparison, Trace, Trace]:
    """`check_engine` for all positions; return the comparison, the reference's float64 trace and the engine's trace."""
    require_engine(engine, "check_engine")
    chosen = shared_taps(engine, list(taps))
    return _Check(engine, prompt, chosen, slice(None), factor, device, progress, streamed).in_memory()


def shared_taps(engine: Engine, patterns: Sequence[str]) -> list[str]:
    """Return the taps of an engine that match any of the patterns, in the engine's order; patterns without a match are skipped.

    Raises:
        ValueError: no pattern matches; the message lists the engine's taps.
    """
    capabilities = engine.capabilities
    found: list[str] = []
    for pattern in patterns:
        with contextlib.suppress(ValueError):
            found += select_taps(capabilities.taps, [pattern], capabilities.name)
    return select_taps(capabilities.taps, found or patterns, capabilities.name)


def states_bytes(
    engine: Engine, prompt: Prompt, taps: Sequence[str], positions: slice | Sequence[int] = slice(None)
) -> int:
    """How many bytes the states of a verdict take: the engine's, the float64 reference's, and those of one run of the noise floor, of
    which only the largest errors are kept."""
    size = engine.plan_trace(prompt, taps, positions).nbytes
    return 2 * size + size // engine.dtype.itemsize * 8


@dataclass(frozen=True)
class _Check:
    """One verdict: what is compared, and how."""

    engine: Engine
    prompt: Prompt
    taps: Sequence[str]
    positions: slice | Sequence[int]
    factor: float
    device: str
    progress: Progress | None
    streamed: bool | None

    @property
    def _dtype(self) -> str:
        return str(self.engine.dtype).removeprefix("torch.")

    @property
    def _last(self) -> Progress | None:
        """Lets the caller stop the runs of a doubtful verdict, too."""
        return part(self.progress, 1.0, 1.0)

    def _run(self, path: Path | None = None) -> Trace:
        report = part(self.progress, 0.85, 1.0)
        return self.engine.trace(self.prompt, self.taps, self.positions, path=path, progress=report)

    def in_memory(self) -> tuple[Comparison, Trace, Trace]:
        """Return the comparison, the reference's float64 trace and the engine's trace."""

        def reference(report: Progress | None, runs: int) -> tuple[Trace, NoiseFloor]:
            return reference_run(
                self.engine.model, self.prompt, self._dtype, self.taps, self.positions, self.device, report, self.streamed, runs
            )  # fmt: skip

        expected, floor = reference(part(self.progress, 0.0, 0.85), FLOOR_RUNS)
        run = self._run()
        comparison = compare_with_doubt(expected, run, floor, self.factor, lambda runs: reference(self._last, runs)[1])
        return comparison, expected, run

    def in_files(self, size: int) -> Comparison:
        """Keep the states of both runs in files, read tap by tap, which are deleted at the end; `size` in bytes is printed."""
        folder = cache_folder().parent / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(prefix=f"check-{os.getpid()}-", dir=folder) as name:
            print(f"{size / 1e9:.1f} GB of states: kept in files in {name} while they are compared", file=sys.stderr)
            exact, rounded = reference_pair(self.engine.model, self._dtype, self.device, self.streamed)
            path = Path(name) / "reference.safetensors"
            what = [ReferencePass(self.prompt, tuple(self.taps), self.positions, path=path)]
            (found,) = reference_runs(exact, rounded, what, progress=part(self.progress, 0.0, 0.85))

            def more(runs: int) -> NoiseFloor:
                known = [(found.trace, found.routers)]
                return reference_runs(exact, rounded, what, known, self._last, floor_runs=runs)[0].floor

            run = self._run(Path(name) / "engine.safetensors")
            return compare_with_doubt(found.trace, run, found.floor, self.factor, more)


def _remove_leftovers(folder: Path) -> None:
    """Delete the files of processes that were killed while they compared."""
    for left in folder.glob("check-*-*"):
        number = left.name.split("-")[1]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
