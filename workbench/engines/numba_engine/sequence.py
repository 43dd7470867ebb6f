"""One request inside the engine: its tokens, where they stand, and how far it has come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from range_kernels import splice, visible_keys

from ...prompt import Prompt
from ..sampling import Answer


class Sequence:
    """A prompt and the tokens generated after it.

    Attributes:
        pages: pages that hold its keys and values, in order.
        computed: tokens whose keys and values are there.
        shareable: whether its keys and values are those of any prompt with the same beginning.
        answer: what it says, None for a run that only reads states.
        deliver: called with each output, or with the error that ended the request.
    """

    def __init__(
        self, prompt: Prompt, answer: Answer | None = None, deliver: Callable[[Any], None] = lambda output: None
    ) -> None:
        self.prompt, self.answer, self.deliver = prompt, answer, deliver
        self.pages: list[int] = []
        self.computed = 0
        self.preemptions = 0
        self.shareable = True
        self.cached = 0  # tokens taken from the prefix cache at the last admission
        self.aborted = False
        self.number = -1
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []  # of a prompt's chunks, where all are asked for
        self._ids = prompt.lookup_ids
        self._said: list[int] = []
        _, self._reach = visible_keys(len(prompt), prompt.bidirectional)
        given = prompt.position_ids
        self._positions = torch.arange(len(prompt)) if given is None else given.to(torch.int64)
        self._following = int(self._positions.max()) + 1
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        """Tokens that are known: the prompt's and the generated ones."""
        return len(self.prompt) + len(self._said)

    @property
    def decoding(self) -> bool:
        """Whether one generated token is all that is to be computed."""
        return bool(self._said) and len(self) - self.computed == 1

    @property
    def wants_prompt_states(self) -> bool:
        """Whether the states of all its prompt's tokens are still to be handed out."""
        return self.answer is not None and self.answer.wants_all and self.answer.made == 0

    def say(self, token: int) -> None:
        """Take a new token in."""
        self._said.append(token)

    def generated(self, start: int, stop: int) -> list[int] | None:
        """Ids of tokens `[start, stop)` where all of them were generated, else None."""
        length = len(self.prompt)
        return self._said[start - length : stop - length] if start >= length else None

    def embed(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Hidden state 0 of tokens `[start, stop)`, of which the first is the prompt's: ranges are clipped to the chunk."""
        length = len(self.prompt)
        within = min(stop, length)
        prompt = self.prompt
        rows = splice(
            torch.tensor(self._ids[start:within]), table, prompt.input_embeddings, prompt.embedding_ranges, offset=start
        )
        return rows if stop <= length else torch.cat([rows, table[self._said[: stop - length]]])

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """Rotary positions, `[..., tokens]`: generated tokens go on after the prompt's largest."""
        length = len(self.prompt)
        after = torch.from_numpy(np.arange(max(start, length), max(stop, length)) + (self._following - length))
        if start >= length:
            return after
        return torch.cat([self._positions[..., start:stop], after.expand(*self._positions.shape[:-1], -1)], dim=-1)

    def reach(self, start: int, stop: int) -> np.ndarray:
        """Last key each token sees, `[tokens]`."""
        return np.concatenate([self._reach[start:stop], np.arange(max(start, len(self.prompt)), stop)])

    def rope_lengths(self, start: int, stop: int) -> torch.Tensor:
        """Length of the sequence when each token was new: the prompt's at least."""
        return torch.arange(start + 1, stop + 1).clamp(min=len(self.prompt))

    def deepstack(self, start: int, stop: int) -> list[tuple[int, torch.Tensor]]:
        """(place counted from `start`, `[levels, rows, hidden]`) of items with features for the first layers."""
        found = []
        for levels, (first, last) in zip(self.prompt.deepstack, self.prompt.embedding_ranges, strict=False):
            a, b = max(first, start), min(last, stop)
            if a < b:
                found.append((a - start, levels[:, a - first : b - first]))
        return found

    def cut(self, wanted: int) -> tuple[int, int]:
        """Where a chunk may end: the last place up to `wanted`, or `computed` if there is none, and the first place after it.

        A chunk ends nowhere inside a bidirectional stretch, whose tokens see each other and so run together.
        """
        first = last = min(wanted, len(self))
        if 0 < first < len(self.prompt) and self._reach[first - 1] >= first:  # inside one
            last = int(self._reach[first - 1]) + 1
            inside = np.flatnonzero(self._reach[:first] < first)
            first = int(inside[-1]) + 1 if len(inside) else 0
            # The stretch's own tokens all reach past `first`, so the last that does not stands right before it.
        return max(first, self.computed), last

    def keys(self, count: int, page_size: int) -> list[bytes]:
        """Names of the first `count` full pages by content: equal names, equal keys and values.

        A name covers everything a page's keys and values are computed from: token ids, the bytes of injected rows and of deepstack
        features, positions, and who sees whom. A page that ends inside a bidirectional stretch depends on the whole stretch.
        """
        while len(self._keys) < count:
            number = len(self._keys)
            start, stop = number * page_size, (number + 1) * page_size
            sha = hashlib.sha256(self._keys[-1] if self._keys else b"")
            reach = self.reach(start, stop)
            end = max(stop, int(reach.max()) + 1)
            self._digest(sha, start, end)
            self._keys.append(sha.digest())
        return self._keys[:count]

    def _digest(self, sha: Any, start: int, stop: int) -> None:
        length = len(self.prompt)
        ids = np.asarray(
            [*self._ids[start:stop], *self._said[max(start - length, 0) : max(stop - length, 0)]], np.int64
        )
        sha.update(ids.tobytes())
        sha.update(self.reach(start, stop).astype(np.int64).tobytes())
        sha.update(self.positions(start, stop).contiguous().numpy().tobytes())
        prompt = self.prompt
        for item, (first, last) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
            a, b = max(first, start), min(last, stop)
            if a < b:
                rows = item[a - first : b - first]
                sha.update(repr((a, b, str(rows.dtype))).encode())
                sha.update(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for place, levels in self.deepstack(start, stop):
            sha.update(repr((place, tuple(levels.shape), str(levels.dtype))).encode())
            sha.update(levels.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
