"""Ownership of the KV cache's pages, and sharing of pages among prompts with the same prefix."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence


class NoPages(Exception):
    """Every page is in use."""


class BlockManager:
    """Reference-counted pages; unused pages of known content are kept until their memory is needed.

    Attributes:
        hits, misses: tokens of admitted prompts found in the cache, and not found.
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
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages in use by requests."""
        return self.pages - self.available

    @property
    def known(self) -> int:
        """Pages whose content is known, used or not."""
        return len(self._page_of)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Take and return the pages of the longest known prefix of `keys`."""
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
        """Take a page without content, evicting known content if no page is free.

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
        """Release pages, the last first, so that the end of a prefix is evicted before its beginning."""
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
        """Register the content of a page; nothing changes if another page has the same content."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """Drop all known content that no request uses."""
        for page in self._idle:
            del self._page_of[self._key_of.pop(page)]
            self._free.append(page)
        self._idle.clear()
