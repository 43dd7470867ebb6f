"""Half-open ranges `[start, stop)`: find what is wrong with them, clip them to a chunk, shift them, pack a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .findings import Finding

Range = tuple[int, int]


def range_faults(ranges: Sequence[Range], length: int, rows: Sequence[int] | None = None) -> Iterator[Finding]:
    """Yield every fault of `ranges` in a prompt of `length` tokens.

    Args:
        rows: rows of each item; None leaves the row counts unchecked.
    """
    if rows is not None and len(rows) != len(ranges):
        yield Finding(
            "item-count",
            "error",
            f"{len(rows)} input_embeddings but {len(ranges)} embedding_ranges: give each item exactly one range",
        )
    end_before, before = 0, None
    for item, (start, stop) in enumerate(ranges):
        named = f"embedding_ranges[{item}] = [{start}, {stop})"
        if start < 0 or stop > length:
            yield Finding(
                "range-bounds",
                "error",
                f"{named} leaves the prompt of {length} tokens: keep 0 <= start < stop <= {length}",
                item,
            )
        if stop < start:
            yield Finding("range-reversed", "error", f"{named} runs backwards: swap its ends, [{stop}, {start})", item)
        elif stop == start:
            yield Finding(
                "range-empty", "error", f"{named} holds no token: drop it, or give it a stop above {start}", item
            )
        elif before is not None and start < end_before:
            first = max(start, ranges[before][0])
            if first < min(stop, end_before):
                shared = min(stop, end_before) - first
                yield Finding(
                    "range-overlap",
                    "error",
                    f"{named} overlaps embedding_ranges[{before}] = [{ranges[before][0]}, {ranges[before][1]}) by {shared} "
                    f"tokens: start it at {end_before} or later",
                    item,
                )
            else:
                yield Finding(
                    "range-order",
                    "error",
                    f"{named} comes after embedding_ranges[{before}] = [{ranges[before][0]}, {ranges[before][1]}) in the "
                    "list but before it in the prompt: sort ranges and items together by start",
                    item,
                )
        if rows is not None and item < len(rows) and stop > start and rows[item] != stop - start:
            yield Finding(
                "row-count",
                "error",
                f"input_embeddings[{item}] has {rows[item]} rows but {named} holds {stop - start} tokens: "
                f"{'drop ' + str(rows[item] - stop + start) + ' rows or widen' if rows[item] > stop - start else 'shorten'}"
                f" the range to [{start}, {start + rows[item]})",
                item,
            )
        if stop > start and stop > end_before:
            end_before, before = stop, item


def clip(ranges: Sequence[Range], start: int, stop: int) -> list[tuple[int, Range]]:
    """Return `(item, range)` for the parts of `ranges` inside the chunk `[start, stop)`, in prompt positions.

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
    """Lay prompts end to end: return their cumulative lengths and all ranges in packed positions.

    >>> pack([4, 3], [[(1, 2)], [(0, 3)]])
    ([0, 4, 7], [(1, 2), (4, 7)])
    """
    cumulative, packed = [0], []
    for length, own in zip(lengths, ranges, strict=True):
        packed += shift(own, cumulative[-1])
        cumulative.append(cumulative[-1] + length)
    return cumulative, packed
