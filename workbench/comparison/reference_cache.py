"""Caches of open reference engines and of their traces, each limited in bytes; the least recently used entries are dropped."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cachetools import LRUCache

from ..engines.freed_memory import return_freed_memory
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.routers import RouterRead
from ..models import Model
from ..progress import Progress, part
from ..prompt import Prompt
from ..trace import Trace
from .floor_runs import FLOOR_RUNS, exact_run, measured_floor
from .noise_floor import NoiseFloor

_MAX_WEIGHT_BYTES = 1 << 28
"""Bytes of the weights of references that are kept open (small models); larger references are opened again for every run."""
_MAX_TRACE_BYTES = 256 << 20
"""Bytes of float64 traces that are kept; a larger trace is not kept."""

_references: LRUCache[tuple, TransformersReference] = LRUCache(
    _MAX_WEIGHT_BYTES, getsizeof=lambda engine: max(engine.weight_bytes, 1 << 20)
)
_runs: LRUCache[tuple, tuple[Trace, dict[str, NoiseFloor], dict[int, RouterRead]]] = LRUCache(
    _MAX_TRACE_BYTES, getsizeof=lambda run: run[0].nbytes
)  # (float64 trace, {dtype: noise floor}, what its routers did)
_lock = threading.Lock()


def reference_engine(model: Model, dtype: str, device: str = "cpu") -> TransformersReference:
    """Return the reference for a model in a dtype. Small ones are shared: kept open and reused while the model's files are unchanged."""
    key = (model.path, model.trust_remote_code, dtype, device, _file_stamps(model))
    with _lock:
        kept = _references.get(key)
    if kept is not None:
        return kept
    opened = TransformersReference(model, dtype=dtype, device=device)
    return_freed_memory(collect=False)
    with _lock:
        if opened.weight_bytes <= _MAX_WEIGHT_BYTES:
            _references[key] = opened
    return opened


def reference_run(
    model: Model,
    prompt: Prompt,
    dtype: str,
    taps: Sequence[str],
    positions: slice | Sequence[int] = slice(None),
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Trace, NoiseFloor]:
    """Return the reference's float64 trace of a prompt, and the prompt's noise floor in `dtype`.

    Recent ones are kept in memory, so that several engines can be compared without running the reference again.

    Args:
        taps: names or patterns. Those names that the reference does not have are left out: of some classes it does not know what
            attention and MLP add.
        progress: called with the fraction done; an exception that it raises stops the runs.
    """
    key = (model.path, _file_stamps(model), prompt.digest, tuple(taps), _positions_key(positions), device)
    with _lock:
        kept = _runs.get(key)
    if kept is None:
        # The float64 run takes about as long as three of the four runs in the engine's dtype.
        return_freed_memory(collect=False)  # this run sets the peak of a notebook
        exact = reference_engine(model, "float64", device)
        taps = [tap for tap in taps if "*" in tap or tap in exact.capabilities.taps] or taps
        trace, routers = exact_run(
            exact, lambda: exact.trace(prompt, taps, positions, progress=part(progress, 0.0, 0.4))
        )
        kept = trace, {}, routers
    expected, floors, routers = kept
    if expected.nbytes <= _MAX_TRACE_BYTES:  # stored before the floor runs, so that cancelling them does not lose it
        with _lock:
            _runs[key] = expected, floors, routers
    if dtype not in floors:
        engine = reference_engine(model, dtype, device)
        floors[dtype] = measured_floor(
            engine,
            expected,
            routers,
            lambda seed: engine.noise_run(prompt, list(expected), positions, seed, _quarter(progress, seed)),
        )
        return_freed_memory(collect=False)
    return expected, floors[dtype]


def _quarter(progress: Progress | None, run: int) -> Progress | None:
    """The part of the progress that belongs to a run of the floor."""
    first, step = 0.4, 0.6 / FLOOR_RUNS
    return part(progress, first + run * step, first + (run + 1) * step)


def _file_stamps(model: Model) -> tuple:
    """Part of the cache key that changes when one of the model's files changes."""
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(model.path.glob("*.*")))


def _positions_key(positions: slice | Sequence[int]) -> tuple:
    if isinstance(positions, slice):
        return (positions.start, positions.stop, positions.step, "slice")
    return tuple(int(position) for position in positions)
