"""Half-open ranges `[start, stop)`: clip them to a chunk, shift them, pack a batch."""

from __future__ import annotations

from collections.abc import Sequence

Range = tuple[int, int]


def clip(ranges: Sequence[Range], start: int, stop: int) -> list[tuple[int, Range]]:
    """Return `(index, range)` for each range that overlaps the chunk `[start, stop)`, cut to the chunk, in prompt positions.

    >>> clip([(2, 6), (8, 9)], 4, 9)
    [(0, (4, 6)), (1, (8, 9))]
    """
    clipped = [(item, (max(a, start), min(b, stop))) for item, (a, b) in enumerate(ranges)]
    return [(item, (a, b)) for item, (a, b) in clipped if a < b]


def shift(ranges: Sequence[Range], by: int) -> list[Range]:
    """Move every range by `by` tokens.

    >>> shift([(2, 6)], -1)
    [(1, 5)]
    """
    return [(start + by, stop + by) for start, stop in ranges]


def pack(lengths: Sequence[int], ranges: Sequence[Sequence[Range]]) -> tuple[list[int], list[Range]]:
    """Concatenate prompts of these lengths: return cumulative lengths (from 0), and all ranges in packed positions.

    >>> pack([4, 3], [[(1, 2)], [(0, 3)]])
    ([0, 4, 7], [(1, 2), (4, 7)])
    """
    cumulative, packed = [0], []
    for length, own in zip(lengths, ranges, strict=True):
        packed += shift(own, cumulative[-1])
        cumulative.append(cumulative[-1] + length)
    return cumulative, packed
