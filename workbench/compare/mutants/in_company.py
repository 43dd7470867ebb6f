"""Faults that no trace of one run shows; probes find them."""

from __future__ import annotations

from typing import Any

import torch

from ...engines.api import Engine
from ...engines.numba_engine.batch import Batch
from ...engines.numba_engine.engine import NumbaEngine
from ...prompt import Prompt
from ..faults import FaultyEngine
from .plant import change_batch


def stale_prefix_cache(engine: NumbaEngine) -> Engine:
    """The prefix cache looks at token ids only, so that the same ids with other rows are answered from the first ones' states."""
    request = engine._request

    def keyed_by_ids(*arguments: Any) -> Any:
        made = request(*arguments)
        ids = made.prompt.input_ids
        made._digest = lambda sha, start, stop: sha.update(repr(ids[start:stop]).encode())  # type: ignore[method-assign]
        return made

    engine._request = keyed_by_ids  # type: ignore[method-assign, assignment]
    return engine


def placeholders_leak(engine: NumbaEngine) -> Engine:
    """A tenth of what stands under a range is added to its rows."""

    def fault(prompt: Prompt) -> Prompt:
        rows = engine.model.token_rows([token % len(engine.model.embedding_table) for token in prompt.input_ids])
        items = [
            item + 0.1 * rows[start:stop].to(item)
            for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True)
        ]
        return prompt.replace(input_embeddings=items)

    return FaultyEngine(engine, fault)


def crowded_batch(engine: NumbaEngine) -> Engine:
    """With more than one request in a step the first one's attention reaches a key too few."""

    def change(batch: Batch) -> None:
        if len(batch.lengths) > 1:
            batch.reach = (batch.reach - 1).clamp(min=0)

    return change_batch(engine, change)


def dice(engine: NumbaEngine, size: float = 1e-3) -> Engine:
    """Hidden state 0 is off by this much of itself, each time another way."""
    generator = torch.Generator().manual_seed(0)

    def change(batch: Batch) -> None:
        noise = torch.randn(batch.hidden.shape, generator=generator)
        batch.hidden = (batch.hidden * (1 + size * noise)).to(batch.hidden.dtype)

    return change_batch(engine, change)
