"""Rows of one head on their way from global to padded rows of shared memory, 16 bytes a thread at a time, in the background.

All in 32 bits but the addresses: Numba's own integers have 64, which took a third of a kernel's instructions.
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
_SHARE = 16  # rows from a multiple of this on lie in one page: pages have at least so many


@cache
def make_fetch(head_dim: int, rows: int, paged: bool = False) -> Any:
    """The intrinsic by which 128 threads start the copies of `rows` rows.

    Where paged, rows are places in a sequence whose pages, of `1 << shift` rows, have their numbers at the address `pages`; the
    first is a multiple of 16.
    """
    row_bytes, chunks = 2 * head_dim + 16, head_dim // 8
    even = THREADS % chunks == 0  # a thread then has the same part of a row at every step

    def emit(
        builder: Any, target: Any, source: Any, stride: Any, first: Any, limit: Any, thread: Any, pages: Any, shift: Any
    ) -> None:
        def number(value: int) -> Any:
            return ir.Constant(I32, value)

        def place_of(row: Any) -> Any:
            return ptx.emit_page_row(builder, pages, shift, row) if paged else row

        shares: dict[int, Any] = {}

        def start_of_share(at: int) -> Any:
            """Where the row `at` after the first lies, in rows; asked for once in 16 rows."""
            if at not in shares:
                row = builder.add(first, number(at))
                shares[at] = place_of(builder.select(builder.icmp_signed("<", row, limit), row, first))
            return shares[at]

        own_row = builder.udiv(thread, number(chunks))
        own_chunk = builder.urem(thread, number(chunks))
        for step in range(-(-rows * chunks // THREADS)):
            if even:
                begin = step * (THREADS // chunks)
                row, chunk = builder.add(own_row, number(begin)), own_chunk
            else:
                piece = builder.add(thread, number(step * THREADS))
                row, chunk = builder.udiv(piece, number(chunks)), builder.urem(piece, number(chunks))
            token = builder.add(first, row)
            inside = builder.icmp_signed("<", token, limit)
            if even and paged and THREADS // chunks <= _SHARE:
                share = begin // _SHARE * _SHARE
                place = builder.add(start_of_share(share), builder.sub(row, number(share)))
            else:
                place = place_of(builder.select(inside, token, first))
            offset = builder.add(builder.mul(builder.zext(place, I64), stride), builder.zext(builder.shl(chunk, number(4)), I64))
            own = builder.add(target, builder.add(builder.mul(own_row if even else row, number(row_bytes)), builder.shl(chunk, number(4))))
            size = builder.select(inside, number(16), number(0))
            ptx.emit_copy_async(builder, own, begin * row_bytes if even else 0, builder.add(source, offset), size)

    @intrinsic
    def fetch(typing_context, target, source, stride, first, limit, thread, pages, shift):
        """Rows from row `first` on, `stride` bytes apart; rows from `limit` on are zeros."""
        number, address = types.int32, types.uint64
        return types.void(types.uint32, address, address, number, number, number, address, number), statement(emit)

    return fetch
