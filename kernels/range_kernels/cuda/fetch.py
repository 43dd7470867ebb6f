"""Rows of one head on their way from global to shared memory, 16 bytes a thread at a time, in the background.

Intrinsics for 128 threads, all in 32 bits but the addresses: Numba's own integers have 64, which took a third of a kernel's
instructions. Where paged, rows are places in a sequence whose pages, of `1 << shift` rows, have their numbers at the address
`pages`; the first is a multiple of 16, and so many rows from there on lie in one page, since pages have at least so many.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import I32, I64, types
from .tile import statement

THREADS = 128
LINE = 128  # bytes of a row in a block of 64 channels
_SHARE = 16  # rows from a multiple of this on lie in one page


@cache
def make_fetch(head_dim: int, rows: int, paged: bool = False) -> Any:
    """The copies of `rows` rows to rows that are padded by 16 bytes, as `tile` reads them."""
    row_bytes, chunks = 2 * head_dim + 16, head_dim // 8
    even = THREADS % chunks == 0  # a thread then has the same part of a row at every step

    def emit(
        builder: Any, target: Any, source: Any, stride: Any, first: Any, limit: Any, thread: Any, pages: Any, shift: Any
    ) -> None:
        find = _Finder(builder, first, limit, pages, shift, paged)
        own_row, own_chunk = builder.udiv(thread, _number(chunks)), builder.urem(thread, _number(chunks))
        for step in range(-(-rows * chunks // THREADS)):
            if even:
                begin = step * (THREADS // chunks)
                row, chunk, line = builder.add(own_row, _number(begin)), own_chunk, own_row
            else:
                begin, piece = 0, builder.add(thread, _number(step * THREADS))
                row, chunk = builder.udiv(piece, _number(chunks)), builder.urem(piece, _number(chunks))
                line = row
            inside = builder.icmp_signed("<", builder.add(first, row), limit)
            share = begin // _SHARE * _SHARE
            place = find.in_share(share, builder.sub(row, _number(share)), inside) if even else find.alone(row, inside)
            chunk = builder.shl(chunk, _number(4))
            offset = builder.add(builder.mul(builder.zext(place, I64), stride), builder.zext(chunk, I64))
            own = builder.add(target, builder.add(builder.mul(line, _number(row_bytes)), chunk))
            size = builder.select(inside, _number(16), _number(0))
            ptx.copy_async(builder, own, begin * row_bytes, builder.add(source, offset), size)

    return _intrinsic(emit)


@cache
def make_swizzled_fetch(head_dim: int, rows: int, paged: bool = False) -> Any:
    """The copies of `rows` rows to blocks of 64 channels, rows of 128 bytes whose 16-byte pieces lie at piece ^ (row % 8)."""

    def emit(
        builder: Any, target: Any, source: Any, stride: Any, first: Any, limit: Any, thread: Any, pages: Any, shift: Any
    ) -> None:
        find = _Finder(builder, first, limit, pages, shift, paged)
        line, piece = builder.lshr(thread, _number(3)), builder.and_(thread, _number(7))
        swizzled = builder.shl(builder.xor(piece, builder.and_(line, _number(7))), _number(4))
        own = builder.add(target, builder.add(builder.mul(line, _number(LINE)), swizzled))
        source = builder.add(source, builder.zext(builder.shl(piece, _number(4)), I64))
        steps = range(0, rows, _SHARE)
        insides = [
            builder.icmp_signed("<", builder.add(first, builder.add(line, _number(step))), limit) for step in steps
        ]
        # All lookups before the first copy: they are under way together.
        places = [find.in_share(step, line, inside) for step, inside in zip(steps, insides, strict=True)]
        for step, inside, place in zip(steps, insides, places, strict=True):
            here = builder.add(source, builder.mul(builder.zext(place, I64), stride))
            size = builder.select(inside, _number(16), _number(0))
            for block in range(head_dim // 64):
                at = builder.add(here, ir.Constant(I64, block * LINE))
                ptx.copy_async(builder, own, (block * rows + step) * LINE, at, size)

    return _intrinsic(emit)


@cache
def make_group_fetch(head_dim: int, rows: int) -> Any:
    """The copies of the queries of a group of heads to `rows` padded rows: row i is query i / group, head i % group."""
    row_bytes, chunks = 2 * head_dim + 16, head_dim // 8

    def emit(
        builder: Any, target: Any, source: Any, token_stride: Any, head_stride: Any, group: Any, count: Any, thread: Any
    ) -> None:
        for first in range(0, rows * chunks, THREADS):
            piece = builder.add(thread, _number(first))
            row, chunk = builder.udiv(piece, _number(chunks)), builder.urem(piece, _number(chunks))
            with builder.if_then(builder.icmp_signed("<", row, _number(rows))):
                inside = builder.icmp_signed("<", row, count)
                there = builder.select(inside, row, _number(0))
                query = builder.udiv(there, group)
                head = builder.sub(there, builder.mul(query, group))
                chunk = builder.shl(chunk, _number(4))
                own = builder.add(target, builder.add(builder.mul(row, _number(row_bytes)), chunk))
                at = builder.add(source, builder.zext(chunk, I64))
                for number, stride in ((query, token_stride), (head, head_stride)):
                    at = builder.add(at, builder.mul(builder.zext(number, I64), stride))
                ptx.copy_async(builder, own, 0, at, builder.select(inside, _number(16), _number(0)))

    @intrinsic
    def fetch(typing_context, target, source, token_stride, head_stride, group, count, thread):
        """`count` rows, the others zeros."""
        number, address = types.int32, types.uint64
        return types.void(types.uint32, address, address, address, number, number, number), statement(emit)

    return fetch


@cache
def make_write(head_dim: int) -> Any:
    """The intrinsic that writes 16 bytes of a new key and of its value to their pages: the `piece`th of keys from `first` on."""
    chunks = head_dim // 8

    def emit(
        builder: Any, keys: Any, values: Any, stride: Any, new: Any, new_stride: Any, new_values: Any, new_values_stride: Any,
        first: Any, piece: Any, pages: Any, shift: Any,
    ) -> None:  # fmt: skip
        row, chunk = builder.udiv(piece, _number(chunks)), builder.urem(piece, _number(chunks))
        chunk = builder.zext(builder.shl(chunk, _number(4)), I64)
        place = ptx.page_row(builder, pages, shift, builder.add(first, row))
        into = builder.add(builder.mul(builder.zext(place, I64), stride), chunk)
        for target, source, step in ((keys, new, new_stride), (values, new_values, new_values_stride)):
            at = builder.add(source, builder.add(builder.mul(builder.zext(row, I64), step), chunk))
            ptx.move(builder, builder.add(target, into), at, ir.Constant(I64, 0))

    @intrinsic
    def write(
        typing_context, keys, values, stride, new, new_stride, new_values, new_values_stride, first, piece, pages, shift
    ):
        number, address = types.int32, types.uint64
        return types.void(*[address] * 7, number, number, address, number), statement(emit)

    return write


class _Finder:
    """Where rows lie in memory, counted in rows; for rows from `limit` on, any place that is there."""

    def __init__(self, builder: Any, first: Any, limit: Any, pages: Any, shift: Any, paged: bool) -> None:
        self.builder, self.first, self.limit = builder, first, limit
        self.pages, self.shift, self.paged = pages, shift, paged
        self._shares: dict[int, Any] = {}

    def alone(self, row: Any, inside: Any) -> Any:
        """The row, counted from the first."""
        row = self.builder.select(inside, self.builder.add(self.first, row), self.first)
        return ptx.page_row(self.builder, self.pages, self.shift, row) if self.paged else row

    def in_share(self, share: int, row: Any, inside: Any) -> Any:
        """The row, counted from the `share`th after the first; the page is asked for once for all of a share."""
        builder = self.builder
        if not self.paged:
            return self.alone(builder.add(row, _number(share)), inside)
        if share not in self._shares:
            begin = builder.add(self.first, _number(share))
            begin = builder.select(builder.icmp_signed("<", begin, self.limit), begin, self.first)
            self._shares[share] = ptx.page_row(builder, self.pages, self.shift, begin)
        return builder.add(self._shares[share], row)


def _number(value: int) -> Any:
    return ir.Constant(I32, value)


def _intrinsic(emit: Any) -> Any:
    @intrinsic
    def fetch(typing_context, target, source, stride, first, limit, thread, pages, shift):
        """Rows from row `first` on, `stride` bytes apart; rows from `limit` on are zeros."""
        number, address = types.int32, types.uint64
        return types.void(types.uint32, address, address, number, number, number, address, number), statement(emit)

    return fetch
