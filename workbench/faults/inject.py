"""Inject faults into batches, between the engine's scheduler and its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.numba_engine.batch import Batch
from ..engines.numba_engine.engine import NumbaEngine


def change_batch(engine: NumbaEngine, change: Callable[[Batch], None]) -> Engine:
    """Patch an engine so that `change` modifies every batch in place before the model runs it; return the engine."""
    run_batch = engine.runner.run_batch

    def changed(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        change(batch)
        return run_batch(batch, pages, tap)

    engine.runner.run_batch = changed  # type: ignore[method-assign]
    return engine


def prefill_in_two_chunks(engine: NumbaEngine, spoil: Callable[[Batch], None]) -> Engine:
    """Patch an engine so that it runs every prompt as two chunks, the first of 64 tokens, and `spoil` modifies the second in place.

    Taps get the states of both chunks, concatenated. Only for traces of one prompt of more than 64 tokens. Returns the engine.
    """
    run_batch = engine.runner.run_batch

    def chunked(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        half = 64  # a whole number of pages
        kept: dict[str, list[torch.Tensor]] = {}
        ends = []
        for number, tokens in enumerate((slice(0, half), slice(half, None))):
            chunk = _slice(batch, tokens)
            if number:
                spoil(chunk)
            ends.append(run_batch(chunk, pages, lambda name, state: kept.setdefault(name, []).append(state.clone())))
        if tap:
            for name, states in kept.items():
                tap(name, torch.cat(states))
        return torch.cat(ends)

    engine.runner.run_batch = chunked  # type: ignore[method-assign]
    return engine


def _slice(batch: Batch, tokens: slice) -> Batch:
    stop = len(batch.hidden) if tokens.stop is None else tokens.stop
    count = stop - tokens.start
    return Batch(
        batch.hidden[tokens],
        batch.positions[..., tokens],
        batch.rope_lengths[tokens],
        batch.query_positions[tokens],
        batch.key_stop[tokens],
        batch.block_table,
        np.asarray([0, count], np.int32),
        np.asarray([stop], np.int32),
        batch.slots,
        batch.decodes,
        [],
    )
