"""Faults that are not visible in the trace of a single run; `workbench.probe` finds them."""

from __future__ import annotations

from typing import Any

import torch

from ..engines.base import Engine
from ..engines.numba_engine.batch import Batch
from ..engines.numba_engine.engine import NumbaEngine
from ..prompt import Prompt
from .faulty_engine import FaultyEngine
from .inject import change_batch
from .registry import batching_fault


@batching_fault("stale prefix cache", "the prefix cache compares token ids only")
def stale_prefix_cache(engine: NumbaEngine) -> Engine:
    """The prefix cache compares token ids only, so a prompt with the same ids and other rows gets the first prompt's states."""
    make_request = engine.make_request

    def keyed_by_ids(*arguments: Any) -> Any:
        request = make_request(*arguments)
        ids = request.prompt.input_ids
        request._digest = lambda sha, start, stop: sha.update(repr(ids[start:stop]).encode())  # type: ignore[method-assign]
        return request

    engine.make_request = keyed_by_ids  # type: ignore[method-assign, assignment]
    return engine


@batching_fault("placeholders leak", "a tenth of the placeholder's embedding is added to each row")
def placeholders_leak(engine: NumbaEngine) -> Engine:
    """A tenth of the placeholder tokens' embeddings is added to the rows of each range."""

    def fault(prompt: Prompt) -> Prompt:
        rows = engine.model.token_rows([token % len(engine.model.embedding_table) for token in prompt.input_ids])
        items = [
            item + 0.1 * rows[start:stop].to(item)
            for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True)
        ]
        return prompt.replace(input_embeddings=items)

    return FaultyEngine(engine, fault)


@batching_fault("crowded batch", "with several requests in a step, attention sees one key too few")
def crowded_batch(engine: NumbaEngine) -> Engine:
    """With more than one request in a step, the attention of every token sees one key too few."""

    def change(batch: Batch) -> None:
        if len(batch.seq_lens) > 1:
            batch.key_stop = (batch.key_stop - 1).clamp(min=1)

    return change_batch(engine, change)


@batching_fault("random states", "hidden state 0 is off by a random 0.1 % in every run")
def random_states(engine: NumbaEngine, size: float = 1e-3) -> Engine:
    """Hidden state 0 has a random relative error of `size`, different in every run."""
    generator = torch.Generator().manual_seed(0)

    def change(batch: Batch) -> None:
        noise = torch.randn(batch.hidden.shape, generator=generator)
        batch.hidden = (batch.hidden * (1 + size * noise)).to(batch.hidden.dtype)

    return change_batch(engine, change)


@batching_fault("decode position", "generated tokens get the position after their own")
def decode_position(engine: NumbaEngine) -> Engine:
    """In steps that generate, each token's rotary position is one too large."""

    def change(batch: Batch) -> None:
        if len(batch.hidden) == len(batch.seq_lens) and int(min(batch.seq_lens)) > 1:
            batch.positions = batch.positions + 1

    return change_batch(engine, change)


@batching_fault(
    "NaN stays", "once a request had NaN rows, every later one gets NaN, as from memory that is multiplied by zero"
)
def nan_stays(engine: NumbaEngine) -> Engine:
    """The engine does not check its prompts, and after NaN in one request all states of all requests are NaN."""
    seen: list[bool] = []
    engine.check = lambda prompt, new_tokens=0: None  # type: ignore[method-assign]

    def change(batch: Batch) -> None:
        if seen or bool(torch.isnan(batch.hidden).any()):
            seen.append(True)
            batch.hidden = torch.full_like(batch.hidden, torch.nan)

    return change_batch(engine, change)
