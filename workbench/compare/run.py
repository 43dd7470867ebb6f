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
) -> tuple[Trace, NoiseFloor]:
    """The truth and the noise floor of a prompt; the last few are kept, so that engines are compared without running it again."""
    key = (model.path, _stamps(model), prompt.digest, dtype, tuple(taps), _key(positions), device)
    with _RUNS_LOCK:
        if key in _RUNS:
            _RUNS.move_to_end(key)
            return _RUNS[key]
    truth = reference(model, "float64", device).trace(prompt, taps, positions)
    floor = NoiseFloor.measure(truth, reference(model, dtype, device).noise_floor(prompt, taps, positions))
    if truth.nbytes > _KEPT:
        return truth, floor
    with _RUNS_LOCK:
        _RUNS[key] = truth, floor
        while sum(kept.nbytes for kept, _ in _RUNS.values()) > _KEPT:
            _RUNS.popitem(last=False)
    return truth, floor


def _key(positions: slice | Sequence[int]) -> tuple:
    if isinstance(positions, slice):
        return (positions.start, positions.stop, positions.step, "slice")
    return tuple(int(position) for position in positions)


_KEPT = 256 << 20
"""Bytes of truths that are kept; a larger one is not."""
_RUNS: OrderedDict[tuple, tuple[Trace, NoiseFloor]] = OrderedDict()
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
) -> Comparison:
    """Does this engine compute what Transformers computes from this prompt?

    The reference runs in float64 and a few times in the engine's dtype, the engine once; see `compare`.

    Args:
        taps: patterns; those that the engine does not have are left out where another of them matches.
        device: where the reference runs.
    """
    dtype = str(engine.dtype).removeprefix("torch.")
    taps = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))
    truth, floor = reference_run(engine.model, prompt, dtype, taps, positions, device)
    return compare(truth, engine.trace(prompt, taps, positions), floor=floor, factor=factor)
