"""One step of the engine: tokens of several requests, packed end to end, and the pages of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from range_kernels import CUDAGraphPlan, PagedPlan
from range_kernels.delta_net import Sequences

from .architectures import AttentionBlocks, Window
from .rope import Rope


class Tokens(Protocol):
    """What a batch needs to know about tokens `[start, stop)` of a request; `Request` implements it and documents the methods."""

    pages: list[int]
    slot: int

    def embed(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor: ...
    def generated(self, start: int, stop: int) -> list[int] | None: ...
    def positions(self, start: int, stop: int) -> torch.Tensor: ...
    def key_stop(self, start: int, stop: int) -> np.ndarray: ...
    def rope_lengths(self, start: int, stop: int) -> torch.Tensor: ...
    def deepstack(self, start: int, stop: int) -> list[tuple[int, torch.Tensor]]: ...


@dataclass
class Batch:
    """Packed tokens. In shapes, `tokens` is their number and `sequences` the number of requests.

    Attributes:
        hidden: `[tokens, hidden]`, hidden state 0.
        positions: int64 `[tokens]`, or `[3, tokens]` with M-RoPE.
        rope_lengths: int64 `[tokens]`, sequence length by which each token's rotary frequencies are chosen (`Request.rope_lengths`).
        query_positions: int32 `[tokens]`, index of each token in its request; windows are measured from it.
        key_stop: int32 `[tokens]`, end (exclusive) of the keys that each token attends to.
        block_table: int32 `[sequences, max pages]`, numbers of each request's pages.
        cu_seqlens_q: int32 `[sequences + 1]`, cumulative number of this batch's tokens per request.
        seq_lens: int32 `[sequences]`, number of keys of each request, earlier tokens included.
        slots: int64 `[sequences]`, where the states of each request's linear attention are (`ModelCache`).
        decodes: whether all tokens were generated, one of each request.
        deepstack: pairs of a slice of the batch's tokens and features `[levels, rows, hidden]`; level k is added after layer k.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    rope_lengths: torch.Tensor
    query_positions: torch.Tensor
    key_stop: torch.Tensor
    block_table: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_lens: np.ndarray
    slots: np.ndarray
    decodes: bool
    deepstack: list[tuple[slice, torch.Tensor]]

    @classmethod
    def of(
        cls, chunks: Sequence[tuple[Tokens, int, int]], table: torch.Tensor, page_size: int, mrope: bool = False
    ) -> Batch:
        """Pack tokens `[start, stop)` of each request. Its pages must contain all earlier tokens and have space for these.

        Args:
            table: token embeddings `[vocab, hidden]`, whose device and dtype the batch gets.
            page_size: tokens per page.
            mrope: whether the model rotates by three axes; positions are then expanded to `[3, tokens]`.
        """
        query_positions = [np.arange(start, stop) for _, start, stop in chunks]
        counts = [-(-stop // page_size) for _, _, stop in chunks]
        block_table = np.zeros((len(chunks), max(counts)), np.int32)
        for row, ((request, _, _), count) in enumerate(zip(chunks, counts, strict=True)):
            block_table[row, :count] = request.pages[:count]
        positions = [request.positions(start, stop) for request, start, stop in chunks]
        if mrope:
            positions = [each.expand(3, -1) for each in positions]
        device = table.device
        first = np.concatenate([[0], np.cumsum([stop - start for _, start, stop in chunks])])
        deepstack = [
            (slice(int(at) + offset, int(at) + offset + rows.shape[1]), rows.to(table))
            for (request, start, stop), at in zip(chunks, first[:-1], strict=True)
            for offset, rows in request.deepstack(start, stop)
        ]
        return cls(
            hidden=_embed(chunks, table),
            positions=_join(positions, -1),
            rope_lengths=_join([request.rope_lengths(start, stop) for request, start, stop in chunks], 0),
            query_positions=torch.from_numpy(np.concatenate(query_positions).astype(np.int32)),
            key_stop=torch.from_numpy(
                np.concatenate([request.key_stop(start, stop) for request, start, stop in chunks]).astype(np.int32)
            ).to(device),
            block_table=block_table,
            cu_seqlens_q=first.astype(np.int32),
            seq_lens=np.asarray([stop for _, _, stop in chunks], np.int32),
            slots=np.asarray([request.slot for request, _, _ in chunks], np.int64),
            decodes=all(
                stop - start == 1 and request.generated(start, stop) is not None for request, start, stop in chunks
            ),
            deepstack=deepstack,
        )

    def sequences(self) -> Sequences:
        """The requests as linear attention takes them, on the batch's device; one whose first token is here begins with a state of zeros."""
        starts = self.query_positions.numpy()[self.cu_seqlens_q[:-1]]
        parts = (self.cu_seqlens_q.astype(np.int64), self.slots, starts == 0)
        return Sequences(*(torch.from_numpy(each).to(self.key_stop.device) for each in parts))

    def key_start(self, window: Window) -> torch.Tensor:
        """The first key that each token attends to, int32 `[tokens]`.

        A window also limits bidirectional spans, as in Transformers.
        """
        return torch.from_numpy(first_keys(self.query_positions.numpy(), window)).to(self.key_stop.device)


def first_keys(positions: np.ndarray, window: Window) -> np.ndarray:
    """The first key that tokens at `positions`, int32, attend to."""
    if isinstance(window, AttentionBlocks):
        return positions // window.size * window.size
    return np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)


@dataclass
class DecoderInputs:
    """A batch as the layers use it, on the decoder's device: rotations are computed once per rope, `key_start` once per window."""

    hidden: torch.Tensor  # [tokens, hidden], hidden state 0
    rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cosines and sines, float32 [tokens, pairs]
    key_starts: dict[Window, torch.Tensor]  # int32 [tokens]
    key_stop: torch.Tensor  # int32 [tokens]
    plan: PagedPlan | CUDAGraphPlan
    deepstack: list[tuple[slice, torch.Tensor]]
    query_scale: torch.Tensor | None = None  # float32 [tokens]
    sequences: Sequences | None = None  # for linear attention


def _embed(chunks: Sequence[tuple[Tokens, int, int]], table: torch.Tensor) -> torch.Tensor:
    """Hidden state 0 of all tokens, `[tokens, hidden]`; generated tokens of all requests are looked up in one call."""
    ids = [request.generated(start, stop) for request, start, stop in chunks]
    generated = [each for each in ids if each is not None]
    rows = table[[token for each in generated for token in each]] if generated else table[:0]
    if len(generated) == len(chunks):
        return rows
    of_each = iter(rows.split([len(each) for each in generated]))
    parts = [
        request.embed(table, start, stop) if each is None else next(of_each)
        for each, (request, start, stop) in zip(ids, chunks, strict=True)
    ]
    return _join(parts, 0)


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
