"""The runs of the reference from which a verdict is made: one in float64, and those in the engine's dtype that measure the noise floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..engines.freed_memory import return_freed_memory
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.routers import RouterRead, RouterWatch
from ..progress import Progress
from ..trace import Trace
from .expert_choices import undecided_choices
from .noise_floor import FloorMeasurement, NoiseFloor

FLOOR_RUNS = 4


def exact_run(engine: TransformersReference, run: Callable[[], Trace]) -> tuple[Trace, dict[int, RouterRead]]:
    """Make the float64 run; return its trace, and what its routers did, by layer (empty without experts)."""
    watch = RouterWatch()
    with engine.watching(watch):
        trace = run()
    return_freed_memory(collect=False)
    return trace, watch.passes[-1]


def measured_floor(
    engine: TransformersReference,
    expected: Trace,
    routers: Mapping[int, RouterRead],
    run: Callable[[int], Trace],
    progress: Progress | None = None,
) -> NoiseFloor:
    """Measure the noise floor of `expected` by runs in the engine's dtype.

    If rounding can change which experts are chosen, there is one more run, in which all those choices are exchanged.

    Args:
        engine: the reference in the engine's dtype.
        expected, routers: from `exact_run`.
        run: makes the run with this seed; 0 is the unperturbed one.
        progress: called with the fraction of runs done; an exception that it raises stops them.
    """
    measurement, watch = FloorMeasurement(expected), RouterWatch()
    with engine.watching(watch):
        for seed in range(FLOOR_RUNS):
            measurement.add(run(seed))
            return_freed_memory(collect=False)
            if progress is not None:
                progress((seed + 1) / FLOOR_RUNS)
    choices, exchanges = undecided_choices(routers, watch.passes)
    if exchanges:
        with engine.watching(RouterWatch(exchanges)):
            measurement.add(run(0), exchanged=True)
    return measurement.floor(choices)
