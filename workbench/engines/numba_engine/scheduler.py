"""Which tokens of which requests run in the next step: continuous batching with chunked prefill.

    waiting --admit (pages for the whole prompt, shared prefix taken)--> running --finish--> gone
       ^-------------------------- preempt (no page left) -------------------|

Each step runs one token of every request that is decoding, then prompts in their order, cut to what is left of the token budget
(Yu et al. 2022, Orca; Agrawal et al. 2023, arXiv:2308.16369). The first prompt of a step always gets on, however small the budget,
and a bidirectional stretch runs whole, so nothing starves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .blocks import BlockManager, NoPages
from .sequence import Sequence


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, stop)` of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.stop == len(self.sequence)


class Scheduler:
    """Requests in the order they came; the youngest gives way where pages run out, and keeps what it has said.

    Args:
        max_batch_size: requests that run at once.
        max_tokens: budget of a step.
        share_prefixes: whether pages of equal content are shared.
    """

    def __init__(
        self, blocks: BlockManager, page_size: int, max_batch_size: int, max_tokens: int, share_prefixes: bool = True
    ) -> None:
        self.blocks, self.page_size = blocks, page_size
        self.max_batch_size, self.max_tokens, self.share_prefixes = max_batch_size, max_tokens, share_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a request and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Piece]:
        """The next step; empty when nothing waits or runs."""
        for sequence in [each for each in (*self.running, *self.waiting) if each.aborted]:
            self.finish(sequence)
        pieces = []
        for sequence in list(self.running):
            if sequence in self.running and sequence.decoding and self._make_room(sequence, len(sequence)):
                pieces.append(Piece(sequence, sequence.computed, len(sequence)))
        pieces = [piece for piece in pieces if piece.sequence in self.running]  # a later one may have pushed it out
        room = self.max_tokens - len(pieces)
        prompts = 0
        for sequence in [each for each in self.running if not each.decoding]:
            room -= self._chunk(sequence, room, pieces, must=not prompts)
            prompts += 1
        while self.waiting and len(self.running) < self.max_batch_size and (room > 0 or not prompts):
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            room -= self._chunk(sequence, room, pieces, must=not prompts)
            prompts += 1
        return pieces

    def advance(self, piece: Piece) -> None:
        """Count a piece as computed; pages that it filled may be shared from now on."""
        sequence = piece.sequence
        sequence.computed = piece.stop
        if self.share_prefixes and sequence.shareable:
            full = piece.stop // self.page_size
            known = piece.start // self.page_size
            for number, key in enumerate(sequence.keys(full, self.page_size)[known:], start=known):
                self.blocks.register(sequence.pages[number], key)

    def _chunk(self, sequence: Sequence, room: int, pieces: list[Piece], must: bool) -> int:
        """Add the next chunk of a prompt; return its tokens."""
        start = sequence.computed
        before, after = sequence.cut(start + max(room, 1 if must else 0))
        stop = before if before > start else after if must else start
        if stop > start:
            pieces.append(Piece(sequence, start, stop))
        return stop - start

    def _admit(self, sequence: Sequence) -> bool:
        """Take the known beginning and pages for the rest; nothing is taken where there are too few."""
        needed = -(-len(sequence) // self.page_size)
        shared: list[int] = []
        usable = self.share_prefixes and sequence.shareable and not sequence.wants_prompt_states
        if usable:  # the last token must run, for its logits
            shared = self.blocks.match(sequence.keys((len(sequence) - 1) // self.page_size, self.page_size))
        if self.blocks.available < needed - len(shared):
            self.blocks.release(shared)
            return False
        sequence.pages = shared + [self.blocks.take() for _ in range(needed - len(shared))]
        sequence.computed = sequence.cached = len(shared) * self.page_size
        if usable:
            self.blocks.hits += sequence.cached
            self.blocks.misses += len(sequence) - sequence.cached
        return True

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """See that a running request has pages for `length` tokens; False where it had to give way itself."""
        while len(sequence.pages) * self.page_size < length:
            try:
                sequence.pages.append(self.blocks.take())
            except NoPages:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a request back to the head of the queue; what it said is kept, its keys and values are computed anew."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        sequence.states.clear()
