"""Run an engine and the reference on one prompt and compare their traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from ..engines.base import Engine
from ..engines.function_engine import require_engine
from ..progress import Progress, part
from ..prompt import Prompt
from ..trace import Trace
from ..trace.taps import EVERY_TAP, select_taps
from .doubt import compare_with_doubt
from .noise_floor import NoiseFloor
from .reference_cache import reference_run
from .reference_work import FLOOR_RUNS
from .verdict import FACTOR, Comparison


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
    if a verdict "bug" would be doubtful (`doubt.py`). The engine runs once. See `compare` for the verdict.

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
    return _judge(engine, prompt, taps, positions, factor, device, progress, streamed)[0]


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
    return _judge(engine, prompt, taps, slice(None), factor, device, progress, streamed)


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


def _judge(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str],
    positions: slice | Sequence[int],
    factor: float,
    device: str,
    progress: Progress | None,
    streamed: bool | None,
) -> tuple[Comparison, Trace, Trace]:
    require_engine(engine, "check_engine")
    dtype = str(engine.dtype).removeprefix("torch.")
    chosen = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))

    def reference(report: Progress | None, runs: int) -> tuple[Trace, NoiseFloor]:
        return reference_run(engine.model, prompt, dtype, chosen, positions, device, report, streamed, runs)

    expected, floor = reference(part(progress, 0.0, 0.85), FLOOR_RUNS)
    run = engine.trace(prompt, chosen, positions, progress=part(progress, 0.85, 1.0))
    last = part(progress, 1.0, 1.0)  # lets the caller stop the runs of a doubtful verdict too
    comparison = compare_with_doubt(expected, run, floor, factor, lambda runs: reference(last, runs)[1])
    return comparison, expected, run
