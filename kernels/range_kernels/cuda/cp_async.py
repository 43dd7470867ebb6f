"""Asynchronous copies (cp.async) of rows of one head from global to shared memory, 16 bytes per thread at a time.

Intrinsics for 128 threads, which call them together. All integers except addresses have 32 bits: Numba's own have 64,
and computing with those took a third of a kernel's instructions. If paged, rows are positions in a sequence whose page
numbers are at the global address `pages`, with `1 << shift` rows per page. The first row is then a multiple of 16 and
pages have at least 16 rows, so each group of 16 rows is in one page.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import I32, I64, types
from .warp_mma import statement

THREADS = 128
LINE = 128  # bytes of a row in a block of 64 channels
_GROUP_ROWS = 16  # an aligned group of this many rows is in one page


@cache
def make_load(head_dim: int, rows: int, paged: bool = False) -> Any:
    """Return the intrinsic that copies `rows` rows to shared memory, padded by 16 bytes as `warp_mma` expects."""
    row_bytes, chunks = 2 * head_dim + 16, head_dim // 8
    whole_rows = THREADS % chunks == 0  # then a thread copies the same chunk of a row at every step

    def emit(
        builder: Any, target: Any, source: Any, stride: Any, first: Any, limit: Any, thread: Any, pages: Any, shift: Any
    ) -> None:
        lookup = _RowLookup(builder, first, limit, pages, shift, paged)
        own_row, own_chunk = builder.udiv(thread, _number(chunks)), builder.urem(thread, _number(chunks))
        for step in range(-(-rows * chunks // THREADS)):
            if whole_rows:
                begin = step * (THREADS // chunks)
                row, chunk, target_row = builder.add(own_row, _number(begin)), own_chunk, own_row
            else:
                begin, index = 0, builder.add(thread, _number(step * THREADS))
                row, chunk = builder.udiv(index, _number(chunks)), builder.urem(index, _number(chunks))
                target_row = row
            inside = builder.icmp_signed("<", builder.add(first, row), limit)
            group_begin = begin // _GROUP_ROWS * _GROUP_ROWS
            source_row = (
                lookup.in_group(group_begin, builder.sub(row, _number(group_begin)), inside)
                if whole_rows
                else lookup.row_of(row, inside)
            )
            chunk = builder.shl(chunk, _number(4))
            offset = builder.add(builder.mul(builder.zext(source_row, I64), stride), builder.zext(chunk, I64))
            own = builder.add(target, builder.add(builder.mul(target_row, _number(row_bytes)), chunk))
            size = builder.select(inside, _number(16), _number(0))
            ptx.copy_async(builder, own, begin * row_bytes, builder.add(source, offset), size)

    return _intrinsic(emit)


@cache
def make_swizzled_load(head_dim: int, rows: int, paged: bool = False) -> Any:
    """Return the intrinsic that copies `rows` rows to shared memory in blocks of 64 channels, swizzled as by TMA.

    In each block, the 16-byte chunk c of a row is at chunk c ^ (row % 8). The last block may be partial; its other channels become zeros.
    """
    blocks = -(-head_dim // 64)
    in_last = head_dim // 8 - 8 * (blocks - 1)  # chunks

    def emit(
        builder: Any, target: Any, source: Any, stride: Any, first: Any, limit: Any, thread: Any, pages: Any, shift: Any
    ) -> None:
        lookup = _RowLookup(builder, first, limit, pages, shift, paged)
        target_row, chunk = builder.lshr(thread, _number(3)), builder.and_(thread, _number(7))
        swizzled = builder.shl(builder.xor(chunk, builder.and_(target_row, _number(7))), _number(4))
        own = builder.add(target, builder.add(builder.mul(target_row, _number(LINE)), swizzled))
        source = builder.add(source, builder.zext(builder.shl(chunk, _number(4)), I64))
        steps = range(0, rows, _GROUP_ROWS)
        insides = [
            builder.icmp_signed("<", builder.add(first, builder.add(target_row, _number(step))), limit)
            for step in steps
        ]
        # All page lookups before the first copy, so that their latencies overlap.
        source_rows = [lookup.in_group(step, target_row, inside) for step, inside in zip(steps, insides, strict=True)]
        for step, inside, source_row in zip(steps, insides, source_rows, strict=True):
            row_address = builder.add(source, builder.mul(builder.zext(source_row, I64), stride))
            size = builder.select(inside, _number(16), _number(0))
            for block in range(blocks):
                at = builder.add(row_address, ir.Constant(I64, block * LINE))
                if block == blocks - 1 and in_last < 8:
                    size = builder.select(builder.icmp_signed("<", chunk, _number(in_last)), size, _number(0))
                ptx.copy_async(builder, own, (block * rows + step) * LINE, at, size)

    return _intrinsic(emit)


@cache
def make_group_load(head_dim: int, rows: int) -> Any:
    """Return the intrinsic that copies the queries of one KV head's `group` query heads into `rows` padded rows.

    Row i is query i // group of head i % group.
    """
    row_bytes, chunks = 2 * head_dim + 16, head_dim // 8

    def emit(
        builder: Any, target: Any, source: Any, token_stride: Any, head_stride: Any, group: Any, count: Any, thread: Any
    ) -> None:
        for first in range(0, rows * chunks, THREADS):
            index = builder.add(thread, _number(first))
            row, chunk = builder.udiv(index, _number(chunks)), builder.urem(index, _number(chunks))
            with builder.if_then(builder.icmp_signed("<", row, _number(rows))):
                inside = builder.icmp_signed("<", row, count)
                source_row = builder.select(inside, row, _number(0))
                query = builder.udiv(source_row, group)
                head = builder.sub(source_row, builder.mul(query, group))
                chunk = builder.shl(chunk, _number(4))
                own = builder.add(target, builder.add(builder.mul(row, _number(row_bytes)), chunk))
                at = builder.add(source, builder.zext(chunk, I64))
                for number, stride in ((query, token_stride), (head, head_stride)):
                    at = builder.add(at, builder.mul(builder.zext(number, I64), stride))
                ptx.copy_async(builder, own, 0, at, builder.select(inside, _number(16), _number(0)))

    @intrinsic
    def load(typing_context, target, source, token_stride, head_stride, group, count, thread):
        """Start copying `count` rows to shared memory at `target`; the others become zeros. Strides are in bytes."""
        number, address = types.int32, types.uint64
        return types.void(types.uint32, address, address, address, number, number, number), statement(emit)

    return load


@cache
def make_write(head_dim: int) -> Any:
    """Return the intrinsic that writes one 16-byte chunk of the new keys, and one of the new values, to their pages.

    `index` is the chunk's number, counted over the rows; `first` the position of the first new key in its sequence.
    Strides are bytes between rows.
    """
    chunks = head_dim // 8

    def emit(
        builder: Any, keys: Any, values: Any, stride: Any, new: Any, new_stride: Any, new_values: Any, new_values_stride: Any,
        first: Any, index: Any, pages: Any, shift: Any,
    ) -> None:  # fmt: skip
        row, chunk = builder.udiv(index, _number(chunks)), builder.urem(index, _number(chunks))
        chunk = builder.zext(builder.shl(chunk, _number(4)), I64)
        target_row = ptx.page_row(builder, pages, shift, builder.add(first, row))
        offset = builder.add(builder.mul(builder.zext(target_row, I64), stride), chunk)
        for target, source, step in ((keys, new, new_stride), (values, new_values, new_values_stride)):
            at = builder.add(source, builder.add(builder.mul(builder.zext(row, I64), step), chunk))
            ptx.move(builder, builder.add(target, offset), at, ir.Constant(I64, 0))

    @intrinsic
    def write(
        typing_context, keys, values, stride, new, new_stride, new_values, new_values_stride, first, index, pages, shift
    ):
        number, address = types.int32, types.uint64
        return types.void(*[address] * 7, number, number, address, number), statement(emit)

    return write


class _RowLookup:
    """The slots of a tile's rows: the row itself, or, if paged, its place in the cache.

    Rows from `limit` on get any valid slot.
    """

    def __init__(self, builder: Any, first: Any, limit: Any, pages: Any, shift: Any, paged: bool) -> None:
        self.builder, self.first, self.limit = builder, first, limit
        self.pages, self.shift, self.paged = pages, shift, paged
        self._groups: dict[int, Any] = {}

    def row_of(self, row: Any, inside: Any) -> Any:
        """Return the slot of row `first + row`."""
        row = self.builder.select(inside, self.builder.add(self.first, row), self.first)
        return ptx.page_row(self.builder, self.pages, self.shift, row) if self.paged else row

    def in_group(self, group_begin: int, row: Any, inside: Any) -> Any:
        """Return the slot of row `first + group_begin + row`; the page number is loaded once per group of 16 rows."""
        builder = self.builder
        if not self.paged:
            return self.row_of(builder.add(row, _number(group_begin)), inside)
        if group_begin not in self._groups:
            begin = builder.add(self.first, _number(group_begin))
            begin = builder.select(builder.icmp_signed("<", begin, self.limit), begin, self.first)
            self._groups[group_begin] = ptx.page_row(builder, self.pages, self.shift, begin)
        return builder.add(self._groups[group_begin], row)


def _number(value: int) -> Any:
    return ir.Constant(I32, value)


def _intrinsic(emit: Any) -> Any:
    @intrinsic
    def load(typing_context, target, source, stride, first, limit, thread, pages, shift):
        """Start copying rows `first`, `first + 1`, ..., `stride` bytes apart, to shared memory at `target`.

        `source` is the global address of row 0 (of the cache, if paged); rows from `limit` on are filled with zeros.
        The copies are not committed.
        """
        number, address = types.int32, types.uint64
        return types.void(types.uint32, address, address, number, number, number, address, number), statement(emit)

    return load
