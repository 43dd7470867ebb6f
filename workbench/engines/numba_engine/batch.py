"""One step of the engine: tokens of several sequences, packed end to end, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Tokens(Protocol):
    """What a batch asks of a sequence, for its tokens `[start, stop)`."""

    pages: list[int]

    def embed(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor: ...
    def generated(self, start: int, stop: int) -> list[int] | None: ...
    def positions(self, start: int, stop: int) -> torch.Tensor: ...
    def reach(self, start: int, stop: int) -> np.ndarray: ...
    def rope_lengths(self, start: int, stop: int) -> torch.Tensor: ...
    def deepstack(self, start: int, stop: int) -> list[tuple[int, torch.Tensor]]: ...


@dataclass
class Batch:
    """Packed tokens; `tokens` is their number, `sequences` how many sequences they belong to.

    Attributes:
        hidden: `[tokens, hidden]`, hidden state 0.
        positions: int64 `[tokens]`, or `[3, tokens]` with M-RoPE.
        rope_lengths: int64 `[tokens]`, length of the sequence by which a token's angles are chosen.
        places: int32 `[tokens]`, places in their sequences, which windows count; `reach`: last key each sees.
        block_table: int32 `[sequences, most pages]`; cu_queries: `[sequences + 1]`; lengths: keys of each sequence.
        deepstack: (rows of the batch, `[levels, rows, hidden]` to add there after the first layers).
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    rope_lengths: torch.Tensor
    places: torch.Tensor
    reach: torch.Tensor
    block_table: np.ndarray
    cu_queries: np.ndarray
    lengths: np.ndarray
    deepstack: list[tuple[slice, torch.Tensor]]

    @classmethod
    def of(
        cls, pieces: Several[tuple[Tokens, int, int]], table: torch.Tensor, page_size: int, mrope: bool = False
    ) -> Batch:
        """Pack tokens `[start, stop)` of each sequence; earlier tokens are in its pages, and pages for these are too."""
        places = [np.arange(start, stop) for _, start, stop in pieces]
        counts = [-(-stop // page_size) for _, _, stop in pieces]
        block_table = np.zeros((len(pieces), max(counts)), np.int32)
        for row, ((sequence, _, _), count) in enumerate(zip(pieces, counts, strict=True)):
            block_table[row, :count] = sequence.pages[:count]
        positions = [sequence.positions(start, stop) for sequence, start, stop in pieces]
        if mrope:
            positions = [each.expand(3, -1) for each in positions]
        device = table.device
        first = np.concatenate([[0], np.cumsum([stop - start for _, start, stop in pieces])])
        deepstack = [
            (slice(int(at) + offset, int(at) + offset + rows.shape[1]), rows.to(table))
            for (sequence, start, stop), at in zip(pieces, first[:-1], strict=True)
            for offset, rows in sequence.deepstack(start, stop)
        ]
        return cls(
            hidden=_embed(pieces, table),
            positions=_join(positions, -1),
            rope_lengths=_join([sequence.rope_lengths(start, stop) for sequence, start, stop in pieces], 0),
            places=torch.from_numpy(np.concatenate(places).astype(np.int32)),
            reach=torch.from_numpy(
                np.concatenate([sequence.reach(start, stop) for sequence, start, stop in pieces]).astype(np.int32)
            ).to(device),
            block_table=block_table,
            cu_queries=first.astype(np.int32),
            lengths=np.asarray([stop for _, _, stop in pieces], np.int32),
            deepstack=deepstack,
        )

    def low(self, window: int | None) -> torch.Tensor:
        """First key each token sees, int32 `[tokens]`: a window holds inside bidirectional spans too (Transformers' rule)."""
        low = torch.zeros_like(self.places) if window is None else (self.places - window + 1).clamp(min=0)
        return low.to(self.reach.device)


def _embed(pieces: Several[tuple[Tokens, int, int]], table: torch.Tensor) -> torch.Tensor:
    """Hidden state 0 of all tokens: generated ones, of however many sequences, by one lookup."""
    ids = [sequence.generated(start, stop) for sequence, start, stop in pieces]
    said = [each for each in ids if each is not None]
    rows = table[[token for each in said for token in each]] if said else table[:0]
    if len(said) == len(pieces):
        return rows
    of_each = iter(rows.split([len(each) for each in said]))
    parts = [
        sequence.embed(table, start, stop) if each is None else next(of_each)
        for each, (sequence, start, stop) in zip(ids, pieces, strict=True)
    ]
    return _join(parts, 0)


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
