"""Run an engine and the reference on one prompt, and compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..engines.api import Engine
from ..engines.transformers_reference import TransformersReference
from ..models import Model
from ..prompt import Prompt
from .verdict import FACTOR, Comparison, compare


@lru_cache(maxsize=4)
def reference(model: Model, dtype: str) -> TransformersReference:
    """The reference in a dtype, loaded once; float64 is the truth, the engine's dtype the noise floor."""
    return TransformersReference(model, dtype=dtype)


def check_engine(
    engine: Engine,
    prompt: Prompt,
    taps: Iterable[str] = ("embed", "layers.*", "layers.*.*", "norm", "logits"),
    positions: slice | Sequence[int] = slice(None),
    factor: float = FACTOR,
) -> Comparison:
    """Does this engine compute what Transformers computes from this prompt?

    The reference runs in float64 and a few times in the engine's dtype, the engine once; see `compare`.
    """
    dtype = str(engine.dtype).removeprefix("torch.")
    truth, floor = reference(engine.model, "float64"), reference(engine.model, dtype)
    taps = [taps] if isinstance(taps, str) else list(taps)
    return compare(
        truth.trace(prompt, taps, positions),
        engine.trace(prompt, taps, positions),
        floor=floor.noise_floor(prompt, taps, positions),
        factor=factor,
    )
