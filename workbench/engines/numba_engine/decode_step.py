"""A decode step: one generated token of each of several requests. Its inputs are written to the GPU in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from range_kernels import CUDAGraphPlan, KVPages

from .batch import DecoderInputs

if TYPE_CHECKING:
    from .decoder import Decoder
    from .model_runner import Chunk


@dataclass(frozen=True)
class DecodeStep:
    """The step as the host knows it; all lists have one entry per request.

    Attributes:
        ids: the tokens.
        positions: their rotary positions.
        seq_lens: number of keys, the token's own included.
        rope_lengths: sequence lengths by which rotary frequencies are chosen (`Request.rope_lengths`).
        pages: numbers of each request's pages.
    """

    ids: list[int]
    positions: list[int]
    seq_lens: list[int]
    rope_lengths: list[int]
    pages: list[list[int]]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page_size: int) -> DecodeStep | None:
        """The step of these chunks; None if one is not a single generated token."""
        ids, positions, seq_lens, rope_lengths, pages = [], [], [], [], []
        for request, start, stop in chunks:
            token = request.generated_at(start)
            if stop - start != 1 or token is None:
                return None
            ids.append(token)
            positions.append(request.position_at(start))
            seq_lens.append(stop)
            rope_lengths.append(max(stop, len(request.prompt)))
            pages.append(request.pages[: -(-stop // page_size)])
        return cls(ids, positions, seq_lens, rope_lengths, pages)


class StepInputs:
    """The inputs of decode steps at fixed addresses, for a CUDA graph: written on the host, copied to the GPU in one piece.

    Args:
        sequences, max_pages, kv_splits: the largest step that fits.
        decoder: whose steps they are.
        pages: the KV cache.

    Attributes:
        ids: int32 `[sequences]` on the GPU.
    """

    def __init__(self, sequences: int, max_pages: int, kv_splits: int, decoder: Decoder, pages: KVPages) -> None:
        self._ropes = [rope for rope in dict.fromkeys(decoder.config.ropes) if rope is not None]
        self._windows = list(dict.fromkeys(decoder.config.windows))
        shapes: list[tuple[int, ...]] = [(sequences,), (sequences,), *[(sequences,)] * len(self._windows)]
        shapes += [(sequences, max_pages), (kv_splits, CUDAGraphPlan.split_fields())]
        shapes += [(sequences, len(rope.frequencies)) for rope in self._ropes for _ in range(2)]
        offsets = np.cumsum([0, *(-(-int(np.prod(shape)) // 4) * 4 for shape in shapes)])  # each aligned to 16 bytes
        self._host = torch.zeros(int(offsets[-1]), dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(int(offsets[-1]), dtype=torch.int32, device=pages.device)

        def views(whole: torch.Tensor) -> list[torch.Tensor]:
            return [
                whole[start : start + int(np.prod(shape))].view(shape)
                for start, shape in zip(offsets[:-1].tolist(), shapes, strict=True)
            ]

        on_host, on_device = ([*each] for each in (views(self._host), views(self._device)))
        at = 2 + len(self._windows)
        self._ids, self._key_stop, *self._key_starts = (each.numpy() for each in on_host[:at])
        self._table, self._splits = (each.numpy() for each in on_host[at : at + 2])
        self._angles = [each.view(torch.float32).numpy() for each in on_host[at + 2 :]]
        self.ids = on_device[0]
        angles = [each.view(torch.float32) for each in on_device[at + 2 :]]
        self._key_stop_on_device, starts = on_device[1], on_device[2:at]
        self._key_starts_on_device = dict(zip(self._windows, starts, strict=True))
        self._rotations = {
            rope: (angles[2 * number], angles[2 * number + 1]) for number, rope in enumerate(self._ropes)
        }
        self._plan = CUDAGraphPlan(
            sequences,
            max_pages,
            kv_splits,
            pages,
            decoder.config.heads,
            block_table=on_device[at],
            splits=on_device[at + 1],
        )

    def write(self, step: DecodeStep, splits: np.ndarray) -> None:
        """Start the copy of a step to the GPU, on the current stream; the copy before must have ended.

        Args:
            splits: its KV splits (`range_kernels.plan_kv_splits`).
        """
        count, positions = len(step.ids), np.asarray(step.seq_lens, np.int32) - 1
        self._ids[:count], self._ids[count:] = step.ids, 0
        self._key_stop[:count], self._key_stop[count:] = step.seq_lens, 0
        for window, key_start in zip(self._windows, self._key_starts, strict=True):
            key_start[:count] = 0 if window is None else np.maximum(positions - window + 1, 0)
        for row, numbers in zip(self._table, step.pages, strict=False):
            row[: len(numbers)] = numbers
        self._splits[: len(splits)], self._splits[len(splits) :] = splits, 0
        own, lengths = torch.tensor(step.positions), torch.tensor(step.rope_lengths)
        for number, rope in enumerate(self._ropes):
            for into, angles in zip(
                self._angles[2 * number : 2 * number + 2], rope.rotation(own, lengths), strict=True
            ):
                into[:count] = angles.numpy()
        self._device.copy_(self._host, non_blocking=True)

    def inputs(self, hidden: torch.Tensor) -> DecoderInputs:
        """What the layers get, with hidden state 0."""
        return DecoderInputs(
            hidden=hidden,
            rotations=self._rotations,
            key_starts=self._key_starts_on_device,
            key_stop=self._key_stop_on_device,
            plan=self._plan,
            deepstack=[],
        )
