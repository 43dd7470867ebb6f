"""Which tokens of which requests run in the next step: continuous batching with chunked prefill.

    waiting --admit (take the cached prefix and pages for the rest)--> running --finish--> removed
       ^-------------------------- preempt (no page left) -----------------|

Each step runs one token of every request that is decoding, then prompts in order of arrival, cut to the rest of the token budget
(Yu et al. 2022, Orca; Agrawal et al. 2023, arXiv:2308.16369). The first prompt of a step always advances by at least one token, or
by a whole bidirectional range even if that exceeds the budget, so no request starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .block_manager import BlockManager, NoPages
from .request import Request


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens `[start, stop)` of a request, to run in the next step."""

    request: Request
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether it ends with the request's last token, so that its logits predict the next one."""
        return self.stop == len(self.request)


class Scheduler:
    """Chooses which tokens run in each step, and assigns KV pages to requests. Not thread-safe: `Loop` guards it by a lock.

    Requests are admitted in order of arrival. If pages run out, the request admitted last is preempted: its generated tokens are
    kept, and its keys and values are computed again later.

    Args:
        blocks: the owner of the KV cache's pages.
        page_size: tokens per page.
        max_batch_size: requests that run at once.
        max_tokens: token budget of a step.
        share_prefixes: whether requests with an equal prefix share its pages.
        invariant: whether a request's tokens must be computed in the same way regardless of other requests: generated tokens one by one, also
            after a preemption, and never in a prompt's pages.
    """

    def __init__(
        self,
        blocks: BlockManager,
        page_size: int,
        max_batch_size: int,
        max_tokens: int,
        share_prefixes: bool = True,
        invariant: bool = False,
    ) -> None:
        self.invariant = invariant
        self.blocks, self.page_size = blocks, page_size
        self.max_batch_size, self.max_tokens, self.share_prefixes = max_batch_size, max_tokens, share_prefixes
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._slots = list(range(max_batch_size))
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Append a request to the waiting queue."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Remove a request and release its pages."""
        if request in self.running:
            self._stop_running(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self) -> list[ScheduledChunk]:
        """Choose the chunks of the next step; empty if no request is waiting or running.

        Removes aborted requests, admits waiting ones, takes pages, and preempts requests if no page is left.
        """
        for request in [each for each in (*self.running, *self.waiting) if each.aborted]:
            self.finish(request)
        chunks = []
        for request in list(self.running):
            if request in self.running and request.decoding and self._reserve_pages(request, len(request)):
                chunks.append(ScheduledChunk(request, request.computed, len(request)))
        chunks = [chunk for chunk in chunks if chunk.request in self.running]  # a later request may have preempted it
        budget = self.max_tokens - len(chunks)
        prompts = 0
        for request in [each for each in self.running if not each.decoding]:
            budget -= self._add_chunk(request, budget, chunks, must=not prompts)
            prompts += 1
        while self.waiting and len(self.running) < self.max_batch_size and (budget > 0 or not prompts):
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            request.slot = self._slots.pop()
            budget -= self._add_chunk(request, budget, chunks, must=not prompts)
            prompts += 1
        return chunks

    def ahead(self, chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
        """The decode step after that of `chunks`, whose tokens are not known yet; empty if it is not certain which requests run in it.

        It takes the pages that the step needs, but never preempts. Requests whose last token is that of `chunks` are left out; one that
        ends by a stop token runs once more, and what it computes is dropped.
        """
        requests = [chunk.request for chunk in chunks]
        admits = bool(self.waiting) and len(self.running) < self.max_batch_size
        known = not all(chunk.last for chunk in chunks)  # tokens that are computed again after a preemption
        if (
            known
            or admits
            or len(requests) != len(self.running)
            or any(each.aborted for each in (*self.running, *self.waiting))
        ):
            return []
        going_on = [chunk for chunk in chunks if not chunk.request.ends_with_next_token]
        lacking = [each.request for each in going_on if len(each.request.pages) * self.page_size <= each.stop]
        if len(lacking) > self.blocks.available:
            return []
        for request in lacking:
            request.pages.append(self.blocks.take())
        return [ScheduledChunk(chunk.request, chunk.stop, chunk.stop + 1) for chunk in going_on]

    def advance(self, chunk: ScheduledChunk) -> None:
        """Record a chunk as computed, and register the pages that it completed in the prefix cache."""
        request = chunk.request
        request.computed = chunk.stop
        if self.share_prefixes and request.shareable:
            full = (min(chunk.stop, len(request.prompt)) if self.invariant else chunk.stop) // self.page_size
            known = chunk.start // self.page_size
            for number, key in enumerate(request.keys(full, self.page_size)[known:], start=known):
                self.blocks.register(request.pages[number], key)

    def _add_chunk(self, request: Request, budget: int, chunks: list[ScheduledChunk], must: bool) -> int:
        """Append the next chunk of a prompt, of at most `budget` tokens, to `chunks`; return its number of tokens (0: none fits).

        With `must` a chunk is added in any case, the shortest possible one if none fits.
        """
        start = request.computed
        wanted = start + max(budget, 1 if must else 0)
        if self.invariant and wanted > len(request.prompt):
            wanted = len(request.prompt) if start < len(request.prompt) else min(wanted, start + 1)
        before, after = request.cut(wanted)
        stop = before if before > start else after if must else start
        if stop > start:
            chunks.append(ScheduledChunk(request, start, stop))
        return stop - start

    def _admit(self, request: Request) -> bool:
        """Take the pages of the cached prefix and pages for the rest; take nothing and return False if too few are available."""
        needed = -(-len(request) // self.page_size)
        shared: list[int] = []
        usable = self.share_prefixes and request.shareable and not request.wants_prompt_states
        if usable:  # the last token must run, for its logits
            # Pages of its own generated tokens, after a preemption, may come from another request's prompt.
            known = min(len(request) - 1, len(request.prompt)) if self.invariant else len(request) - 1
            shared = self.blocks.match(request.keys(known // self.page_size, self.page_size))
        if self.blocks.available < needed - len(shared):
            self.blocks.release(shared)
            return False
        request.pages = shared + [self.blocks.take() for _ in range(needed - len(shared))]
        request.computed = request.cached = len(shared) * self.page_size
        if usable:
            self.blocks.hits += request.cached
            self.blocks.misses += len(request) - request.cached
        return True

    def _reserve_pages(self, request: Request, length: int) -> bool:
        """Ensure that a running request has pages for `length` tokens; False if it was itself preempted."""
        while len(request.pages) * self.page_size < length:
            try:
                request.pages.append(self.blocks.take())
            except NoPages:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is request:
                    return False
        return True

    def _preempt(self, request: Request) -> None:
        """Put a request back at the head of the queue; generated tokens are kept, keys and values computed again."""
        self._stop_running(request)
        self._release(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _stop_running(self, request: Request) -> None:
        self.running.remove(request)
        self._slots.append(request.slot)

    def _release(self, request: Request) -> None:
        self.blocks.release(request.pages)
        request.pages, request.computed = [], 0
        request.states.clear()
