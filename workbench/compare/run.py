"""Run an engine and the reference on one prompt, and compare."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..engines.api import Engine
from ..engines.transformers_reference import TransformersReference
from ..models import Model
from ..progress import Progress, part
from ..prompt import Prompt
from ..taps import EVERY_TAP, select_taps
from ..trace import Trace
from .floor import NoiseFloor
from .verdict import FACTOR, Comparison, compare


def reference(model: Model, dtype: str, device: str = "cpu") -> TransformersReference:
    """The reference in a dtype, loaded once while the model's files stay as they are."""
    return _load(model, dtype, device, _stamps(model))


def _stamps(model: Model) -> tuple:
    """What changes when somebody changes the model's files."""
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(model.path.glob("*.*")))


@lru_cache(maxsize=4)
def _load(model: Model, dtype: str, device: str, stamps: tuple) -> TransformersReference:
    return TransformersReference(model, dtype=dtype, device=device)


def reference_run(
    model: Model,
    prompt: Prompt,
    dtype: str,
    taps: Sequence[str],
    positions: slice | Sequence[int] = slice(None),
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Trace, NoiseFloor]:
    """The truth and the noise floor of a prompt; the last few are kept, so that engines are compared without running it again."""
    key = (model.path, _stamps(model), prompt.digest, tuple(taps), _key(positions), device)
    with _RUNS_LOCK:
        kept = _RUNS.get(key)
        if kept:
            _RUNS.move_to_end(key)
    # The float64 run takes about as long as three of the four others together.
    truth, floors = kept or (
        reference(model, "float64", device).trace(prompt, taps, positions, progress=part(progress, 0.0, 0.4)),
        {},
    )
    if truth.nbytes <= _KEPT:  # kept at once: what stops the rest leaves it whole
        with _RUNS_LOCK:
            _RUNS[key] = truth, floors
            while sum(kept.nbytes for kept, _ in _RUNS.values()) > _KEPT:
                _RUNS.popitem(last=False)
    if dtype not in floors:
        runs = reference(model, dtype, device).noise_floor(prompt, taps, positions, progress=part(progress, 0.4, 1.0))
        floors[dtype] = NoiseFloor.measure(truth, runs)
    return truth, floors[dtype]


def _key(positions: slice | Sequence[int]) -> tuple:
    if isinstance(positions, slice):
        return (positions.start, positions.stop, positions.step, "slice")
    return tuple(int(position) for position in positions)


_KEPT = 256 << 20
"""Bytes of truths that are kept; a larger one is not."""
_RUNS: OrderedDict[tuple, tuple[Trace, dict[str, NoiseFloor]]] = OrderedDict()
"""Truths, and the noise floors of each by dtype."""
_RUNS_LOCK = threading.Lock()


def shared_taps(engine: Engine, patterns: Sequence[str]) -> list[str]:
    """The taps of an engine that match any of the patterns; where none does, the engine names what it has.

    Raises:
        ValueError: no pattern matches.
    """
    have = engine.capabilities
    found: list[str] = []
    for pattern in patterns:
        with contextlib.suppress(ValueError):
            found += select_taps(have.taps, [pattern], have.name)
    return select_taps(have.taps, found or patterns, have.name)


def check_engine(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str] = EVERY_TAP,
    positions: slice | Sequence[int] = slice(None),
    factor: float = FACTOR,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Does this engine compute what Transformers computes from this prompt?

    The reference runs in float64 and a few times in the engine's dtype, the engine once; see `compare`.

    Args:
        taps: patterns; those that the engine does not have are left out where another of them matches.
        device: where the reference runs.
        progress: called with the share that is done; what it raises stops the run.
    """
    truth, floor, run = _both(engine, prompt, taps, positions, device, progress)
    return compare(truth, run, floor=floor, factor=factor)


def check_with_traces(
    engine: Engine, prompt: Prompt, progress: Progress | None = None
) -> tuple[Comparison, Trace, Trace]:
    """`check_engine` of all that can be compared, with what it compared: the truth and the engine's trace."""
    truth, floor, run = _both(engine, prompt, EVERY_TAP, slice(None), "cpu", progress)
    return compare(truth, run, floor=floor), truth, run


def _both(
    engine: Engine, prompt: Prompt, taps: Iterable[str], positions: slice | Sequence[int], device: str, progress: Progress | None
) -> tuple[Trace, NoiseFloor, Trace]:  # fmt: skip
    dtype = str(engine.dtype).removeprefix("torch.")
    taps = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))
    truth, floor = reference_run(engine.model, prompt, dtype, taps, positions, device, part(progress, 0.0, 0.85))
    return truth, floor, engine.trace(prompt, taps, positions, progress=part(progress, 0.85, 1.0))
