"""What runs with streamed weights will read and how long they will take, told before they begin."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..engines.transformers.reference import TransformersReference
from .reference_work import FLOOR_RUNS

_SAMPLE = 64 << 20
_SIDE = 1024


@dataclass(frozen=True)
class StreamPlan:
    """The plan of runs.

    Attributes:
        model: its name.
        bytes: read from the checkpoint.
        layer_bytes: memory of the largest layer in float64 and in the engine's dtype.
        seconds: an estimate, from the speed at which a sample of the checkpoint is read and a small matrix product computed.
    """

    model: str
    bytes: int
    layer_bytes: int
    seconds: float

    @classmethod
    def of(cls, exact: TransformersReference, rounded: TransformersReference, tokens: int) -> StreamPlan:
        """The plan of one float64 run and those of the noise floor, of `tokens` tokens in all."""
        weights = exact.streamed
        assert weights is not None
        assert rounded.streamed is not None
        size = weights.stored_bytes
        operations = 2.0 * tokens * weights.parameters * _active(exact)
        work = operations * (_seconds_per_operation(exact) + FLOOR_RUNS * _seconds_per_operation(rounded))
        layer = weights.largest_layer + rounded.streamed.largest_layer
        return cls(exact.model.name, size, layer, size * weights.seconds_per_byte(_SAMPLE) + work)

    def __str__(self) -> str:
        return (
            f"reference of {self.model}: {self.bytes / 1e9:.1f} GB of weights are read layer by layer, memory for a layer "
            f"{self.layer_bytes / 1e9:.1f} GB, about {self.seconds:.0f} s"
        )


def _active(engine: TransformersReference) -> float:
    """The part of the weights that a token uses: of experts, those that are chosen."""
    config = engine.model.text_config
    count = next(
        (
            value
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if (value := getattr(config, name, None))
        ),
        0,
    )
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / count if count and chosen else 1.0


def _seconds_per_operation(engine: TransformersReference) -> float:
    one = torch.ones(_SIDE, _SIDE, dtype=engine.dtype, device=engine.device)
    _ = (one @ one)[0, 0].item()
    began = time.perf_counter()
    _ = (one @ one)[0, 0].item()
    return (time.perf_counter() - began) / (2 * _SIDE**3)
