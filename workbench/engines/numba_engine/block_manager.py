"""The KV cache's pages: which are free or in use, and which are shared by requests with the same prefix."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence


class NoPages(Exception):
    """Every page is in use."""


class BlockManager:
    """Counts the users of each page by its number. Not thread-safe: `Loop` guards it by a lock.

    Content is known by a key, the hash from `Request.keys`. Unused pages of known content form the prefix cache: they are kept
    until a page is needed, and the least recently used one is evicted first.

    Attributes:
        pages: number of pages.
        hits, misses: tokens of admitted prompts found in the prefix cache, and not found.
        evictions: pages of known content evicted to make space.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.hits = self.misses = self.evictions = 0
        self._free = deque(range(pages))
        self._users = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known content, no users; least recently used first

    @property
    def available(self) -> int:
        """Number of pages that can be taken: free ones, and unused ones of known content."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages in use by requests."""
        return self.pages - self.available

    @property
    def known(self) -> int:
        """Number of pages whose content is known, in use or not."""
        return len(self._page_of)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Return the pages whose contents are the longest known prefix of `keys`, and count one more user of each."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._users[page] += 1
            found.append(page)
        return found

    def take(self) -> int:
        """Return a page to write into, with one user; if none is free, evict the least recently used known content.

        Raises:
            NoPages: every page is in use.
        """
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self.evictions += 1
        else:
            raise NoPages
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each page, the last page first, so that the end of a prefix is evicted before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] < 0:
                raise AssertionError(f"page {page} was released twice")
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Record that a page's content is `key`, so that `match` finds it; does nothing if another page already has this content."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """Free all unused pages of known content: empty the prefix cache."""
        for page in self._idle:
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        self._idle.clear()
