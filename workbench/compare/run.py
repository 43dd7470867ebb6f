"""Run an engine and the reference on one prompt, and compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..engines.api import Engine
from ..engines.transformers_reference import TransformersReference
from ..models import Model
from ..prompt import Prompt
from ..taps import EVERY_TAP, select_taps
from .verdict import FACTOR, Comparison, compare


def reference(model: Model, dtype: str, device: str = "cpu") -> TransformersReference:
    """The reference in a dtype, loaded once while the model's files stay as they are."""
    stamps = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(model.path.glob("*.*")))
    return _load(model, dtype, device, stamps)


@lru_cache(maxsize=4)
def _load(model: Model, dtype: str, device: str, stamps: tuple) -> TransformersReference:
    return TransformersReference(model, dtype=dtype, device=device)


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
    truth, floor = reference(engine.model, "float64", device), reference(engine.model, dtype, device)
    taps = shared_taps(engine, [taps] if isinstance(taps, str) else list(taps))
    return compare(
        truth.trace(prompt, taps, positions),
        engine.trace(prompt, taps, positions),
        floor=floor.noise_floor(prompt, taps, positions),
        factor=factor,
    )
