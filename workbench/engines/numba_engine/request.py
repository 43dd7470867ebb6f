"""One request inside the engine: its tokens, their positions, and its progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from range_kernels import splice, visible_keys

from ...prompt import Prompt
from ..sampling import GenerationState


class Request:
    """A prompt and the tokens generated after it.

    Attributes:
        pages: numbers of the KV pages with its keys and values, in token order.
        slot: where the states of its linear attention are, while it runs.
        computed: number of tokens whose keys and values are in the pages.
        shareable: whether its pages may be shared with requests that have the same prefix; False if its keys also depend on its
            total length (some rope scalings).
        generation: state of its generation; None if only hidden states are read.
        deliver: called with each EngineOutput, or with the exception that ended the request, in the thread that runs the step.
        aborted: the request is dropped before the next step; set from any thread.
        number: its number in the order of arrival; -1 until it is submitted.
    """

    def __init__(
        self,
        prompt: Prompt,
        generation: GenerationState | None = None,
        deliver: Callable[[Any], None] = lambda output: None,
    ) -> None:
        self.prompt, self.generation, self.deliver = prompt, generation, deliver
        self.pages: list[int] = []
        self.slot = 0
        self.computed = 0
        self.preemptions = 0
        self.shareable = True
        self.cached = 0  # tokens taken from the prefix cache at the last admission
        self.aborted = False
        self.number = -1
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the prompt's chunks, if all are requested
        self._ids = prompt.lookup_ids
        self._generated: list[int] = []
        _, self._key_stop = visible_keys(len(prompt), prompt.bidirectional_ranges)
        given = prompt.position_ids
        self._positions = torch.arange(len(prompt)) if given is None else given.to(torch.int64)
        self._next_position = int(self._positions.max()) + 1
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        """The number of tokens: the prompt's and those generated so far."""
        return len(self.prompt) + len(self._generated)

    @property
    def decoding(self) -> bool:
        """Whether its next step is a decode step: all tokens but the last generated one are computed."""
        return bool(self._generated) and len(self) - self.computed == 1

    @property
    def wants_prompt_states(self) -> bool:
        """Whether the states of all prompt tokens are requested and not yet delivered."""
        return self.generation is not None and self.generation.wants_all_states and self.generation.num_generated == 0

    @property
    def ends_with_next_token(self) -> bool:
        """Whether the next token is the last one that it may generate."""
        generation = self.generation
        return generation is not None and generation.num_generated + 1 >= generation.config.max_new_tokens

    def append_token(self, token: int) -> None:
        """Append a generated token, which the next step computes."""
        self._generated.append(token)

    def generated_at(self, index: int) -> int | None:
        """The id of token `index` if it was generated, else None."""
        return self._generated[index - len(self.prompt)] if index >= len(self.prompt) else None

    def position_at(self, index: int) -> int:
        """The rotary position of generated token `index`."""
        return index - len(self.prompt) + self._next_position

    def generated(self, start: int, stop: int) -> list[int] | None:
        """Ids of tokens `[start, stop)` if all of them were generated, else None."""
        length = len(self.prompt)
        return self._generated[start - length : stop - length] if start >= length else None

    def embed(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Hidden state 0 of tokens `[start, stop)`, as `[tokens, hidden]`: looked up in `table` `[vocab, hidden]`, with items spliced in.

        `start` must be in the prompt; embedding ranges are clipped to the chunk.
        """
        length = len(self.prompt)
        within = min(stop, length)
        prompt = self.prompt
        rows = splice(
            torch.tensor(self._ids[start:within]), table, prompt.input_embeddings, prompt.embedding_ranges, offset=start
        )
        return rows if stop <= length else torch.cat([rows, table[self._generated[: stop - length]]])

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """Rotary positions of tokens `[start, stop)`, int64 `[tokens]`, or `[3, tokens]` for prompt tokens with M-RoPE positions.

        Generated tokens continue from the prompt's largest position.
        """
        length = len(self.prompt)
        after = torch.from_numpy(np.arange(max(start, length), max(stop, length)) + (self._next_position - length))
        if start >= length:
            return after
        return torch.cat([self._positions[..., start:stop], after.expand(*self._positions.shape[:-1], -1)], dim=-1)

    def key_stop(self, start: int, stop: int) -> np.ndarray:
        """For each token of `[start, stop)` the end (exclusive) of the keys that it attends to, `[tokens]`."""
        return np.concatenate([self._key_stop[start:stop], np.arange(max(start, len(self.prompt)), stop) + 1])

    def rope_lengths(self, start: int, stop: int) -> torch.Tensor:
        """For each token of `[start, stop)` the sequence length that its rotary frequencies are chosen by, int64 `[tokens]`.

        It is the number of tokens up to and including it, but at least the prompt's length, as in Transformers, which runs the
        prompt at once. Only rope scalings that depend on the length use it (dynamic NTK, LongRoPE).
        """
        return torch.arange(start + 1, stop + 1).clamp(min=len(self.prompt))

    def deepstack(self, start: int, stop: int) -> list[tuple[int, torch.Tensor]]:
        """Deepstack features (added to hidden states after the first layers) of the items in tokens `[start, stop)`.

        Returns:
            for each such item, clipped to the chunk: the offset of its first row from `start`, and `[levels, rows, hidden]`.
        """
        found = []
        for levels, (first, last) in zip(self.prompt.deepstack, self.prompt.embedding_ranges, strict=False):
            a, b = max(first, start), min(last, stop)
            if a < b:
                found.append((a - start, levels[:, a - first : b - first]))
        return found

    def cut(self, wanted: int) -> tuple[int, int]:
        """Return the two allowed ends of a chunk next to index `wanted`: the last one at or before it, the first one at or after it.

        A chunk never ends inside a bidirectional range, whose tokens attend to each other and so must run in one step. If no
        allowed end lies between `computed` and `wanted`, the first number is `computed` (an empty chunk).
        """
        first = last = min(wanted, len(self))
        if 0 < first < len(self.prompt) and self._key_stop[first - 1] > first:  # inside a bidirectional range
            last = int(self._key_stop[first - 1])
            outside = np.flatnonzero(self._key_stop[:first] <= first)
            first = int(outside[-1]) + 1 if len(outside) else 0
            # All tokens of the range attend to keys past `first`, so the last token that does not is right before the range.
        return max(first, self.computed), last

    def keys(self, count: int, page_size: int) -> list[bytes]:
        """Content hashes of the first `count` full pages: equal hashes mean equal keys and values.

        A hash covers everything a page's keys and values are computed from: token ids, the bytes of injected rows and of deepstack
        features, positions, and the mask. A page that ends inside a bidirectional range depends on the whole range.
        """
        while len(self._keys) < count:
            number = len(self._keys)
            start, stop = number * page_size, (number + 1) * page_size
            sha = hashlib.sha256(self._keys[-1] if self._keys else b"")
            end = max(stop, int(self.key_stop(start, stop).max()))
            self._digest(sha, start, end)
            self._keys.append(sha.digest())
        return self._keys[:count]

    def _digest(self, sha: Any, start: int, stop: int) -> None:
        length = len(self.prompt)
        ids = np.asarray(
            [*self._ids[start:stop], *self._generated[max(start - length, 0) : max(stop - length, 0)]], np.int64
        )
        sha.update(ids.tobytes())
        sha.update(self.key_stop(start, stop).astype(np.int64).tobytes())
        sha.update(self.positions(start, stop).contiguous().numpy().tobytes())
        prompt = self.prompt
        for item, (first, last) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
            a, b = max(first, start), min(last, stop)
            if a < b:
                rows = item[a - first : b - first]
                sha.update(repr((a, b, str(rows.dtype))).encode())
                sha.update(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for offset, levels in self.deepstack(start, stop):
            sha.update(repr((offset, tuple(levels.shape), str(levels.dtype))).encode())
            sha.update(levels.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
