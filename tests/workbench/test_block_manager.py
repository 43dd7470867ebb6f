"""KV cache pages: each is free, idle or in use, and none is handed out twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.engines.numba_engine.block_manager import BlockManager, NoPages


def test_shared_pages_are_freed_by_their_last_user():
    blocks = BlockManager(4)
    first = [blocks.take(), blocks.take()]
    for page, key in zip(first, (b"a", b"b"), strict=True):
        blocks.register(page, key)
    assert blocks.match([b"a", b"b", b"c"]) == first
    assert blocks.match([b"x", b"b"]) == []
    blocks.release(first)
    assert blocks.used == 2
    blocks.release(first)
    assert (blocks.used, blocks.known) == (0, 2)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(first[:1])


def test_eviction_starts_at_the_end_of_an_unused_prefix():
    blocks = BlockManager(3)
    pages = [blocks.take() for _ in range(3)]
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        blocks.register(page, key)
    blocks.release(pages)
    assert blocks.take() == pages[2]
    assert blocks.match([b"a", b"b", b"c"]) == pages[:2]
    assert blocks.evictions == 1
    with pytest.raises(NoPages):
        blocks.take()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=120), st.integers(1, 12))
def test_pages_are_never_lost_or_handed_out_twice(moves, count):
    """Requests take, register, share and release pages in any order; registered pages keep their content."""
    blocks = BlockManager(count)
    content: dict[int, bytes | None] = {}
    held: list[list[int]] = []
    for kind, number in moves:
        if kind == 0:
            try:
                page = blocks.take()
            except NoPages:
                assert blocks.available == 0
                continue
            assert all(page not in pages for pages in held)
            content[page] = None
            held.append([page])
        elif kind == 1 and held:
            page, key = held[number % len(held)][-1], bytes([number % 7])
            blocks.register(page, key)
            content[page] = key if content[page] is None and key not in content.values() else content[page]
        elif kind == 2 and held:
            blocks.release(held.pop(number % len(held)))
        elif kind == 3:
            found = blocks.match([bytes([number % 7])])
            assert [content[page] for page in found] == [bytes([number % 7])] * len(found)
            if found:
                held.append(found)
        assert blocks.used == len({page for pages in held for page in pages})
        assert blocks.used + blocks.available == count
    for pages in held:
        blocks.release(pages)
    blocks.forget()
    assert (blocks.used, blocks.known, blocks.available) == (0, 0, count)
    assert sorted(blocks.take() for _ in range(count)) == list(range(count))
