"""The runs of the reference from which a verdict is made: one in float64, and those in the engine's dtype that measure the noise floor.

If the weights are streamed, all runs go through each layer together, and its weights are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..engines.freed_memory import return_freed_memory
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.routers import RouterRead
from ..progress import Progress
from ..trace import Trace
from .reference_pass import ReferencePass
from .reference_work import FLOOR_RUNS, ReferenceRun, ReferenceWork
from .runs_together import reads_together, run_together

_EXACT_SHARE = 0.4
"""Part of the time that the float64 run takes: about as long as three of the four runs in the engine's dtype."""


def reference_runs(
    exact: TransformersReference,
    rounded: TransformersReference,
    passes: Sequence[ReferencePass],
    known: Sequence[tuple[Trace, Mapping[int, RouterRead]] | None] | None = None,
    progress: Progress | None = None,
    exact_done: Callable[[Trace, Mapping[int, RouterRead]], None] | None = None,
    unfinished: Path | None = None,
    floor_runs: int = FLOOR_RUNS,
) -> list[ReferenceRun]:
    """Make the float64 run of each pass, and measure its noise floor by runs in the engine's dtype.

    If rounding can change which experts are chosen, one more run has all those choices exchanged.

    Args:
        exact, rounded: the reference in float64, and in the engine's dtype.
        known: for each pass the float64 trace and its routers, if they are known.
        progress: called with the fraction done; an exception that it raises stops the runs.
        exact_done: called with each float64 trace and its routers before the floor's runs begin, if they are not made together.
        unfinished: folder in which runs that are made together keep what they have done, and from which they go on; None: one in the
            cache folder.
        floor_runs: how many runs in the engine's dtype measure the floor.

    Raises:
        TraceError: states are too large, or contain NaN; `unfinished` has runs of something else.
    """
    known = [None] * len(passes) if known is None else known
    works = [ReferenceWork(exact, rounded, each, found, floor_runs) for each, found in zip(passes, known, strict=True)]
    if reads_together(exact, rounded):
        run_together(exact, rounded, works, progress, unfinished)
    else:
        try:
            _run_in_turn(exact, rounded, works, progress, exact_done)
        finally:
            for engine in (exact, rounded):
                if engine.streamed is not None:
                    engine.streamed.forget()
    return [work.result() for work in works]


def _run_in_turn(
    exact: TransformersReference,
    rounded: TransformersReference,
    works: Sequence[ReferenceWork],
    progress: Progress | None,
    exact_done: Callable[[Trace, Mapping[int, RouterRead]], None] | None,
) -> None:
    report = progress or (lambda fraction: None)
    for number, work in enumerate(works):
        first, step = number / len(works), 1 / len(works)
        if not work.is_known:
            with work.writing():
                work.run_exact(exact)
            if exact_done is not None:
                exact_done(work.trace(), work.routers)
            return_freed_memory(collect=False)
            report(first + step * _EXACT_SHARE)
        for seed in range(work.floor_runs):
            work.run_rounded(rounded, seed)
            return_freed_memory(collect=False)
            report(first + step * (_EXACT_SHARE + (1 - _EXACT_SHARE) * (seed + 1) / work.floor_runs))
        if work.exchanges:
            work.run_exchanged(rounded)
