"""Run an engine and the reference on one prompt and compare their traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from ..engines.base import Engine
from ..progress import Progress, part
from ..prompt import Prompt
from ..trace import Trace
from ..trace.taps import EVERY_TAP, select_taps
from .noise_floor import NoiseFloor
from .reference_cache import reference_run
from .verdict import FACTOR, Comparison, compare


def check_engine(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str] = EVERY_TAP,
    positions: slice | Sequence[int] = slice(None),
    factor: float = FACTOR,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Compare an engine with the reference, Transformers, on one prompt.

    The reference runs once in float64 and four times in the engine's dtype; the engine runs once. See `compare`.

    Args:
        taps: patterns of tap names. A pattern that matches no tap of the engine is skipped if another one matches.
        positions: which tokens to compare.
        factor: largest error that counts as noise, in noise floors.
        device: where the reference runs.
        progress: called with the fraction done; an exception that it raises stops the run.
    """
    expected, floor, run = _run_both(engine, prompt, taps, positions, device, progress)
    return compare(expected, run, floor=floor, factor=factor)


def check_with_traces(
    engine: Engine, prompt: Prompt, progress: Progress | None = None
) -> tuple[Comparison, Trace, Trace]:
    """Run `check_engine` over all taps; return the comparison, the float64 trace and the engine's trace."""
    expected, floor, run = _run_both(engine, prompt, EVERY_TAP, slice(None), "cpu", progress)
    return compare(expected, run, floor=floor), expected, run


def shared_taps(engine: Engine, patterns: Sequence[str]) -> list[str]:
    """Return the taps of an engine that match any of the patterns.

    Raises:
        ValueError: no pattern matches; the message lists the engine's taps.
    """
    capabilities = engine.capabilities
    found: list[str] = []
    for pattern in patterns:
        with contextlib.suppress(ValueError):
            found += select_taps(capabilities.taps, [pattern], capabilities.name)
    return select_taps(capabilities.taps, found or patterns, capabilities.name)


def _run_both(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str],
    positions: slice | Sequence[int],
    device: str,
    progress: Progress | None,
) -> tuple[Trace, NoiseFloor, Trace]:
    dtype = str(engine.dtype).removeprefix("torch.")
    chosen = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))
    expected, floor = reference_run(engine.model, prompt, dtype, chosen, positions, device, part(progress, 0.0, 0.85))
    return expected, floor, engine.trace(prompt, chosen, positions, progress=part(progress, 0.85, 1.0))
