"""Caches of open reference engines and of their traces, each limited in bytes; the least recently used entries are dropped."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from cachetools import LRUCache

from ..engines.freed_memory import return_freed_memory
from ..engines.transformers.memory import free_memory, weight_bytes
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.routers import RouterRead
from ..models import Model
from ..progress import Progress
from ..prompt import Prompt
from ..trace import Trace
from .floor_runs import reference_runs
from .noise_floor import NoiseFloor
from .reference_pass import ReferencePass
from .reference_work import FLOOR_RUNS

_MAX_WEIGHT_BYTES = 1 << 28
"""Bytes of the weights of references that are kept open (small models); larger references are opened again for every run."""
_MAX_TRACE_BYTES = 256 << 20
"""Bytes of float64 traces that are kept; a larger trace is not kept."""

_references: LRUCache[tuple, TransformersReference] = LRUCache(
    _MAX_WEIGHT_BYTES, getsizeof=lambda engine: max(engine.weight_bytes, 1 << 20)
)
_runs: LRUCache[tuple, tuple[Trace, dict[tuple[str, int], NoiseFloor], dict[int, RouterRead]]] = LRUCache(
    _MAX_TRACE_BYTES, getsizeof=lambda run: run[0].nbytes
)  # (float64 trace, {(dtype, runs): noise floor}, what its routers did)
_lock = threading.Lock()


def reference_engine(
    model: Model, dtype: str, device: str = "cpu", streamed: bool | None = None
) -> TransformersReference:
    """Return the reference for a model in a dtype. Small ones are shared: kept open and reused while the model's files are unchanged.

    Args:
        streamed: whether its weights are streamed (`TransformersReference`).
    """
    key = (model.path, model.trust_remote_code, dtype, device, streamed, _file_stamps(model))
    with _lock:
        kept = _references.get(key)
    if kept is not None:
        return kept
    opened = TransformersReference(model, dtype=dtype, device=device, streamed=streamed)
    return_freed_memory(collect=False)
    with _lock:
        if opened.weight_bytes <= _MAX_WEIGHT_BYTES:
            _references[key] = opened
    return opened


def forget() -> None:
    """Close all kept references and drop their traces."""
    with _lock:
        _references.clear()
        _runs.clear()
    return_freed_memory()


def reference_pair(
    model: Model, dtype: str, device: str = "cpu", streamed: bool | None = None
) -> tuple[TransformersReference, TransformersReference]:
    """The reference in float64 and in a dtype. Where both do not fit into memory, both are streamed.

    Args:
        streamed: whether the weights are streamed; None: as `TransformersReference` decides, or if the two do not fit together.
    """
    where = torch.device(device)
    if streamed is None and where.type != "cpu":
        both = weight_bytes(model, torch.float64) + weight_bytes(model, getattr(torch, dtype))
        streamed = True if both > 0.8 * free_memory(where) else None
    return reference_engine(model, "float64", device, streamed), reference_engine(model, dtype, device, streamed)


def reference_run(
    model: Model,
    prompt: Prompt,
    dtype: str,
    taps: Sequence[str],
    positions: slice | Sequence[int] = slice(None),
    device: str = "cpu",
    progress: Progress | None = None,
    streamed: bool | None = None,
    floor_runs: int = FLOOR_RUNS,
) -> tuple[Trace, NoiseFloor]:
    """Return the reference's float64 trace of a prompt, and the prompt's noise floor in `dtype`.

    Recent ones are kept in memory, so that several engines can be compared without running the reference again.

    Args:
        taps: names or patterns. Those names that the reference does not have are left out: of some classes it does not know what
            attention and MLP add.
        progress: called with the fraction done; an exception that it raises stops the runs.
        streamed: as for `reference_pair`.
        floor_runs: how many runs in `dtype` measure the floor.
    """
    key = (model.path, _file_stamps(model), prompt.digest, tuple(taps), _positions_key(positions), device)
    with _lock:
        kept = _runs.get(key)
    expected, floors, routers = (None, {}, {}) if kept is None else kept
    which = (dtype, floor_runs)
    if expected is None or which not in floors:
        return_freed_memory(collect=False)  # this run sets the peak of a notebook
        exact, rounded = reference_pair(model, dtype, device, streamed)
        known = None if expected is None else (expected, routers)
        what = ReferencePass(prompt, tuple(taps), positions)

        def keep(run: Trace, read: Mapping[int, RouterRead]) -> None:
            if run.nbytes <= _MAX_TRACE_BYTES:  # kept before the floor's runs, so that stopping them does not lose it
                with _lock:
                    _runs[key] = run, floors, dict(read)

        (found,) = reference_runs(exact, rounded, [what], [known], progress, keep, floor_runs=floor_runs)
        expected, floors[which] = found.trace, found.floor
        keep(expected, found.routers)
        return_freed_memory(collect=False)
    return expected, floors[which]


def _file_stamps(model: Model) -> tuple:
    """Part of the cache key that changes when one of the model's files changes."""
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(model.path.glob("*.*")))


def _positions_key(positions: slice | Sequence[int]) -> tuple:
    if isinstance(positions, slice):
        return (positions.start, positions.stop, positions.step, "slice")
    return tuple(int(position) for position in positions)
