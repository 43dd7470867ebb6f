"""How a fault gets between the engine's steps and its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...engines.api import Engine
from ...engines.numba_engine.batch import Batch
from ...engines.numba_engine.engine import NumbaEngine


def change_batch(engine: NumbaEngine, change: Callable[[Batch], None]) -> Engine:
    """Change every batch before the model runs it."""
    forward = engine.decoder.forward

    def changed(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        change(batch)
        return forward(batch, pages, tap)

    engine.decoder.forward = changed  # type: ignore[method-assign]
    return engine


def in_two_chunks(engine: NumbaEngine, spoil: Callable[[Batch], None]) -> Engine:
    """Run every prefill as two chunks, the second of which is spoilt; taps see both as one."""
    forward = engine.decoder.forward

    def chunked(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        half = 64  # whole pages
        kept: dict[str, list[torch.Tensor]] = {}
        ends = []
        for part, chunk in enumerate((slice(0, half), slice(half, None))):
            piece = _slice(batch, chunk)
            if part:
                spoil(piece)
            ends.append(forward(piece, pages, lambda name, state: kept.setdefault(name, []).append(state.clone())))
        if tap:
            for name, states in kept.items():
                tap(name, torch.cat(states))
        return torch.cat(ends)

    engine.decoder.forward = chunked  # type: ignore[method-assign]
    return engine


def _slice(batch: Batch, chunk: slice) -> Batch:
    stop = len(batch.hidden) if chunk.stop is None else chunk.stop
    count = stop - chunk.start
    return Batch(
        batch.hidden[chunk],
        batch.positions[..., chunk],
        batch.rope_lengths[chunk],
        batch.places[chunk],
        batch.reach[chunk],
        batch.block_table,
        np.asarray([0, count], np.int32),
        np.asarray([stop], np.int32),
        [],
    )
