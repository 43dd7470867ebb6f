"""A decode step: one generated token of each of several requests. Its inputs are written to the GPU in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from range_kernels import CUDAGraphPlan, KVPages

from .batch import DecoderInputs, first_keys

if TYPE_CHECKING:
    from .decoder import Decoder
    from .model_runner import Chunk


@dataclass(frozen=True)
class DecodeStep:
    """The step as the host knows it; all lists have one entry per request.

    Attributes:
        ids: the tokens; -1 - r for the token that row r of the step before chooses, which is known on the GPU only.
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
    def of(cls, chunks: Sequence[Chunk], page_size: int, after: Sequence[int] | None = None) -> DecodeStep | None:
        """The step of these chunks; None if one is not a single generated token.

        Args:
            after: for each chunk the row of the step before that chooses its token; None: the tokens are known.
        """
        ids, positions, seq_lens, rope_lengths, pages = [], [], [], [], []
        for number, (request, start, stop) in enumerate(chunks):
            token = request.generated_at(start) if after is None else -1 - after[number]
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

    Two steps can be under way: each is written to the host buffer that the one before did not use.

    Attributes:
        ids: int32 `[sequences]` on the GPU, as in `DecodeStep`.
    """

    def __init__(self, sequences: int, max_pages: int, kv_splits: int, decoder: Decoder, pages: KVPages) -> None:
        self._ropes = [rope for rope in dict.fromkeys(decoder.config.ropes) if rope is not None]
        self._windows = list(dict.fromkeys(decoder.config.windows))
        shapes: list[tuple[int, ...]] = [(sequences,), (sequences,), *[(sequences,)] * len(self._windows)]
        shapes += [(sequences, max_pages), (kv_splits, CUDAGraphPlan.split_fields())]
        shapes += [(sequences, len(rope.frequencies)) for rope in self._ropes for _ in range(2)]
        self._query_scale = decoder.config.query_scale
        shapes += [(sequences,)] * (self._query_scale is not None)
        offsets = np.cumsum([0, *(-(-int(np.prod(shape)) // 4) * 4 for shape in shapes)])  # each aligned to 16 bytes
        self._device = torch.zeros(int(offsets[-1]), dtype=torch.int32, device=pages.device)

        def views(whole: torch.Tensor) -> list[torch.Tensor]:
            return [
                whole[start : start + int(np.prod(shape))].view(shape)
                for start, shape in zip(offsets[:-1].tolist(), shapes, strict=True)
            ]

        at = 2 + len(self._windows)
        hosts = [torch.zeros(int(offsets[-1]), dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._hosts = [_HostBuffer(host, views(host), at) for host in hosts]
        on_device = views(self._device)
        self.ids, self._key_stop = on_device[:2]
        self._key_starts = dict(zip(self._windows, on_device[2:at], strict=True))
        angles = [each.view(torch.float32) for each in on_device[at + 2 :]]
        self._scales = None if self._query_scale is None else angles.pop()
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
        """Start the copy of a step to the GPU, on the current stream; the copy before the last one must have ended.

        Args:
            splits: its KV splits (`CUDAGraphPlan.kv_splits_of`).
        """
        host = self._hosts[0]
        self._hosts.reverse()
        count, positions = len(step.ids), np.asarray(step.seq_lens, np.int32) - 1
        host.ids[:count], host.ids[count:] = step.ids, 0
        host.key_stop[:count], host.key_stop[count:] = step.seq_lens, 0
        for window, key_start in zip(self._windows, host.key_starts, strict=True):
            key_start[:count] = first_keys(positions, window)
        for row, numbers in zip(host.table, step.pages, strict=False):
            row[: len(numbers)] = numbers
        host.splits[: len(splits)], host.splits[len(splits) :] = splits, 0
        own, lengths = torch.tensor(step.positions), torch.tensor(step.rope_lengths)
        for number, rope in enumerate(self._ropes):
            for into, angles in zip(host.angles[2 * number : 2 * number + 2], rope.rotation(own, lengths), strict=True):
                into[:count] = angles.numpy()
        if self._query_scale is not None:
            host.angles[-1][:count] = self._query_scale.of(own.numpy() if self._query_scale.rotary else positions)
        self._device.copy_(host.whole, non_blocking=True)

    def inputs(self, hidden: torch.Tensor) -> DecoderInputs:
        """What the layers get, with hidden state 0."""
        return DecoderInputs(
            hidden=hidden,
            rotations=self._rotations,
            key_starts=self._key_starts,
            key_stop=self._key_stop,
            plan=self._plan,
            deepstack=[],
            query_scale=self._scales,
        )


class _HostBuffer:
    """One pinned buffer and the NumPy views of its parts."""

    def __init__(self, whole: torch.Tensor, parts: list[torch.Tensor], angles_at: int) -> None:
        self.whole = whole
        arrays = [each.numpy() for each in parts]
        self.ids, self.key_stop, *self.key_starts = arrays[:angles_at]
        self.table, self.splits = arrays[angles_at : angles_at + 2]
        self.angles = [each.view(np.float32) for each in arrays[angles_at + 2 :]]
