"""What one warp does to its part of an attention tile, unrolled when it is compiled.

A warp holds `m_tiles` times 16 query rows. Numbers lie in registers as mma.sync m16n8k16 lays them out (PTX ISA, "Matrix
fragments for mma.m16n8k16"): of a 16 x 8 result a thread has rows `lane / 4` and `lane / 4 + 8`, columns `2 (lane % 4)` and the
next. Scores `s` are `[m_tiles, keys / 8, 4]`, sums `o` `[m_tiles, head_dim / 8, 4]`, in local arrays that the compiler turns into
registers, since every index here is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import F32, I32, types

KEYS = 64  # keys a tile
LOG2_E = 1.4426950408889634


def sums_row(head_dim: int) -> int:
    """Bytes of a row of float32 sums in shared memory: eight rows lie in different banks."""
    return 4 * head_dim + 32


@dataclass(frozen=True)
class TileOperations:
    """Intrinsics of one kind of tile; see `tile_operations`."""

    start: Callable[..., Any]
    scores: Callable[..., Any]
    hide: Callable[..., Any]
    weights: Callable[..., Any]
    add_values: Callable[..., Any]
    store: Callable[..., Any]
    keep: Callable[..., Any]


def load(builder: Any, pointer: Any, count: int) -> list[Any]:
    """The numbers of a local array, which the compiler keeps in registers."""
    return [builder.load(builder.gep(pointer, [ir.Constant(I32, i)])) for i in range(count)]


def save(builder: Any, pointer: Any, values: list[Any]) -> None:
    """Set the numbers of a local array."""
    for i, value in enumerate(values):
        builder.store(value, builder.gep(pointer, [ir.Constant(I32, i)]))


def soften(
    builder: Any, scores: list[Any], tops: list[Any], totals: list[Any], factor: Any, m_tiles: int = 1
) -> list[Any]:
    """One step of the online softmax, in place: scores to weights, maxima and totals of rows; returns what sums shrink by."""
    zero, minus_infinity = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
    columns, shrinks = len(scores) // (4 * m_tiles), []
    for m in range(m_tiles):
        for half in range(2):
            row = 2 * m + half
            places = [(m * columns + column) * 4 + 2 * half + side for column in range(columns) for side in range(2)]
            top = tops[row]
            for place in places:
                top = ptx.maximum(builder, top, scores[place])
            for flip in (1, 2):
                top = ptx.maximum(builder, top, ptx.from_lane(builder, top, flip))
            # A row that has seen no key yet has minus infinity here; it must not be subtracted from itself.
            base = builder.select(builder.fcmp_ordered("==", top, minus_infinity), zero, top)
            shift = builder.fsub(zero, builder.fmul(base, factor))
            shrink = ptx.exp2(builder, builder.fma(tops[row], factor, shift))
            added = zero
            for place in places:
                scores[place] = ptx.exp2(builder, builder.fma(scores[place], factor, shift))
                added = builder.fadd(added, scores[place])
            totals[row] = builder.fma(totals[row], shrink, added)
            tops[row] = top
            shrinks.append(shrink)
    return shrinks


def shrink_sums(builder: Any, sums: list[Any], shrinks: list[Any], m_tiles: int = 1) -> None:
    """Rows of sums times their factor, in place."""
    for place in range(len(sums)):
        row = place // (len(sums) // m_tiles) * 2 + place % 4 // 2
        sums[place] = builder.fmul(sums[place], shrinks[row])


def share_of(builder: Any, total: Any) -> Any:
    """What sums of a row are multiplied with at last: 1 / total; of a row that saw no key, whose sums are zero, 1."""
    zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
    return ptx.reciprocal(builder, builder.select(builder.fcmp_ordered("==", total, zero), one, total))


def transpose_in_four_lanes(builder: Any, column: Any, words: list[Any]) -> list[Any]:
    """Of four words in each of four neighbouring lanes, the `column`th of all: lane after lane what lane `column` is to write."""
    odd, late = (
        builder.icmp_unsigned("!=", builder.and_(column, ir.Constant(I32, bit)), ir.Constant(I32, 0)) for bit in (1, 2)
    )
    pairs = []
    for first, second in (words[:2], words[2:]):
        other = ptx.from_lane(builder, builder.select(odd, first, second), 1)
        pairs.append((builder.select(odd, other, first), builder.select(odd, second, other)))
    others = [
        ptx.from_lane(builder, builder.select(late, first, second), 2) for first, second in zip(*pairs, strict=True)
    ]
    front = [builder.select(late, other, own) for other, own in zip(others, pairs[0], strict=True)]
    return front + [builder.select(late, own, other) for other, own in zip(others, pairs[1], strict=True)]


def cap(builder: Any, value: Any, inner: Any, outer: Any) -> Any:
    """outer * tanh(inner * value), by tanh x = 1 - 2 / (1 + e^2x)."""
    one, two = ir.Constant(F32, 1.0), ir.Constant(F32, 2.0)
    power = ptx.exp2(builder, builder.fmul(builder.fmul(value, inner), ir.Constant(F32, 2 * LOG2_E)))
    tanh = builder.fsub(one, builder.fmul(two, ptx.reciprocal(builder, builder.fadd(one, power))))
    return builder.fmul(outer, tanh)


def statement(emit: Callable[..., None]) -> Callable[[Any, Any, Any, Any], Any]:
    """Code generation of an intrinsic that returns nothing; arrays come as pointers to their first number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            context.make_array(kind)(context, builder, value=value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, args, strict=True)
        ]
        emit(builder, *values)
        return context.get_dummy_value()

    return codegen


@cache
def tile_operations(head_dim: int, m_tiles: int, dtype: str, softcap: bool, keys: int = KEYS) -> TileOperations:
    """The operations for a head size and keys a warp (multiples of 16), rows a warp (16 times `m_tiles`) and dtype."""
    row_bytes = 2 * head_dim + 16  # 16 bytes of padding: eight rows then lie in different banks
    columns, channels = keys // 8, head_dim // 8
    minus_infinity = ir.Constant(F32, float("-inf"))

    def at(builder: Any, address: Any, offset: int) -> Any:
        return builder.add(address, ir.Constant(I32, offset)) if offset else address

    def emit_start(builder: Any, o: Any, largest: Any, total: Any) -> None:
        zero = ir.Constant(F32, 0.0)
        save(builder, o, [zero] * (m_tiles * channels * 4))
        save(builder, largest, [minus_infinity] * (2 * m_tiles))
        save(builder, total, [zero] * (2 * m_tiles))

    def emit_scores(builder: Any, s: Any, q_address: Any, k_address: Any, inner: Any, outer: Any) -> None:
        sums = [[ir.Constant(F32, 0.0)] * 4 for _ in range(m_tiles * columns)]
        for step in range(head_dim // 16):
            queries = [
                ptx.load_matrices(builder, at(builder, q_address, m * 16 * row_bytes + step * 32))
                for m in range(m_tiles)
            ]
            for pair in range(columns // 2):
                pieces = ptx.load_matrices(builder, at(builder, k_address, pair * 16 * row_bytes + step * 32))
                for m in range(m_tiles):
                    for half in range(2):
                        place = m * columns + 2 * pair + half
                        sums[place] = ptx.multiply_add(
                            builder, dtype, queries[m], pieces[2 * half : 2 * half + 2], sums[place]
                        )
        values = [value for group in sums for value in group]
        if softcap:
            values = [cap(builder, value, inner, outer) for value in values]
        save(builder, s, values)

    def emit_hide(builder: Any, s: Any, key: Any, row: Any, lows: Any, reaches: Any) -> None:
        values = load(builder, s, m_tiles * columns * 4)
        for m in range(m_tiles):
            for half in range(2):
                offset = builder.mul(builder.add(row, ir.Constant(I32, m * 16 + half * 8)), ir.Constant(I32, 4))
                low = builder.sub(ptx.load_shared(builder, builder.add(lows, offset)), key)
                reach = builder.sub(ptx.load_shared(builder, builder.add(reaches, offset)), key)
                for column in range(columns):
                    for side in range(2):
                        place = (m * columns + column) * 4 + 2 * half + side
                        here = ir.Constant(I32, column * 8 + side)
                        seen = builder.and_(
                            builder.icmp_signed("<=", low, here), builder.icmp_signed(">=", reach, here)
                        )
                        values[place] = builder.select(seen, values[place], minus_infinity)
        save(builder, s, values)

    def emit_weights(builder: Any, s: Any, o: Any, largest: Any, total: Any, factor: Any) -> None:
        scores, sums = load(builder, s, m_tiles * columns * 4), load(builder, o, m_tiles * channels * 4)
        before, totals = load(builder, largest, 2 * m_tiles), load(builder, total, 2 * m_tiles)
        shrinks = soften(builder, scores, before, totals, factor, m_tiles)
        shrink_sums(builder, sums, shrinks, m_tiles)
        save(builder, s, scores)
        save(builder, o, sums)
        save(builder, largest, before)
        save(builder, total, totals)

    def emit_add_values(builder: Any, o: Any, s: Any, v_address: Any) -> None:
        scores, sums = load(builder, s, m_tiles * columns * 4), load(builder, o, m_tiles * channels * 4)
        for step in range(keys // 16):
            weights = []
            for m in range(m_tiles):
                tiles = [scores[(m * columns + 2 * step + half) * 4 :][:4] for half in range(2)]
                weights.append(
                    [ptx.pack(builder, dtype, *tile[2 * side : 2 * side + 2]) for tile in tiles for side in range(2)]
                )
            for pair in range(channels // 2):
                values = ptx.load_matrices(builder, at(builder, v_address, step * 16 * row_bytes + pair * 32), True)
                for m in range(m_tiles):
                    for half in range(2):
                        first = (m * channels + 2 * pair + half) * 4
                        sums[first : first + 4] = ptx.multiply_add(
                            builder, dtype, weights[m], values[2 * half : 2 * half + 2], sums[first : first + 4]
                        )
        save(builder, o, sums)

    def emit_store(builder: Any, o: Any, total: Any, target: Any, stride: Any, row: Any, rows: Any, lane: Any) -> None:
        sums, totals = load(builder, o, m_tiles * channels * 4), load(builder, total, 2 * m_tiles)
        column = builder.and_(lane, ir.Constant(I32, 3))
        for m in range(m_tiles):
            for half in range(2):
                whole = totals[2 * m + half]
                for flip in (1, 2):
                    whole = builder.fadd(whole, ptx.from_lane(builder, whole, flip))
                share = share_of(builder, whole)
                words = []
                for channel in range(channels):
                    first = (m * channels + channel) * 4 + 2 * half
                    low, high = (builder.fmul(sums[first + side], share) for side in range(2))
                    words.append(ptx.pack(builder, dtype, low, high))
                pieces = [words[first : first + 4] for first in range(0, channels // 4 * 4, 4)]
                pieces = [transpose_in_four_lanes(builder, column, piece) for piece in pieces]
                here = builder.add(row, ir.Constant(I32, m * 16 + half * 8))
                with builder.if_then(builder.icmp_signed("<", here, rows)):
                    start = builder.add(target, builder.mul(stride, builder.zext(here, ptx.I64)))
                    own = builder.add(start, builder.zext(builder.mul(column, ir.Constant(I32, 16)), ptx.I64))
                    for number, piece in enumerate(pieces):
                        ptx.store_words(builder, builder.add(own, ir.Constant(ptx.I64, number * 64)), piece)
                    own = builder.add(start, builder.zext(builder.mul(column, ir.Constant(I32, 4)), ptx.I64))
                    for number in range(4 * len(pieces), channels):
                        ptx.store_global(builder, builder.add(own, ir.Constant(ptx.I64, number * 16)), words[number])

    def emit_keep(
        builder: Any, o: Any, largest: Any, total: Any, sums_at: Any, marks_at: Any, rows: Any, lane: Any
    ) -> None:
        sums, maxima = load(builder, o, channels * 4), load(builder, largest, 2)
        totals = load(builder, total, 2)
        row = builder.lshr(lane, ir.Constant(I32, 2))
        column = builder.and_(lane, ir.Constant(I32, 3))
        for half in range(2):
            whole = totals[half]
            for flip in (1, 2):
                whole = builder.fadd(whole, ptx.from_lane(builder, whole, flip))
            with builder.if_then(builder.icmp_signed("<", ir.Constant(I32, 8 * half), rows)):
                here = builder.add(row, ir.Constant(I32, 8 * half))
                start = builder.add(
                    builder.add(sums_at, builder.mul(here, ir.Constant(I32, sums_row(head_dim)))),
                    builder.mul(column, ir.Constant(I32, 8)),
                )
                for channel in range(channels):
                    first = channel * 4 + 2 * half
                    ptx.store_shared_floats(builder, at(builder, start, channel * 32), sums[first : first + 2])
                # The four lanes of a row hold the same numbers and write the same.
                mark = builder.add(marks_at, builder.mul(here, ir.Constant(I32, 8)))
                ptx.store_shared_floats(builder, mark, [maxima[half], whole])

    @intrinsic
    def start(typing_context, o, largest, total):
        """Sums to zero, maxima to minus infinity."""
        return types.void(o, largest, total), statement(emit_start)

    @intrinsic
    def scores(typing_context, s, q_address, k_address, inner, outer):
        """s = q k^T for the tile in shared memory, capped where the kernel caps."""
        signature = types.void(s, types.uint32, types.uint32, types.float32, types.float32)
        return signature, statement(emit_scores)

    @intrinsic
    def hide(typing_context, s, key, row, lows, reaches):
        """Minus infinity where the key at a column (the thread's first is `key`) is outside its row's bounds."""
        signature = types.void(s, types.int32, types.int32, types.uint32, types.uint32)
        return signature, statement(emit_hide)

    @intrinsic
    def weights(typing_context, s, o, largest, total, factor):
        """Online softmax: scores to weights 2 ** (factor (s - maximum)), sums shrunk to the new maximum."""
        return types.void(s, o, largest, total, types.float32), statement(emit_weights)

    @intrinsic
    def add_values(typing_context, o, s, v_address):
        """o += weights times values."""
        return types.void(o, s, types.uint32), statement(emit_add_values)

    @intrinsic
    def store(typing_context, o, total, target, stride, row, rows, lane):
        """Write o / total to rows below `rows`, `stride` bytes apart; zeros for rows that saw no key."""
        signature = types.void(o, total, types.uint64, types.uint64, types.int32, types.int32, types.int32)
        return signature, statement(emit_store)

    @intrinsic
    def keep(typing_context, o, largest, total, sums, marks, rows, lane):
        """Write 16 rows as they are to shared memory: sums, `sums_row` bytes a row, and marks (maximum, total); all float32.

        Of fewer than 9 `rows`, the first 8 are written.
        """
        address, number = types.uint32, types.int32
        return types.void(o, largest, total, address, address, number, number), statement(emit_keep)

    return TileOperations(start, scores, hide, weights, add_values, store, keep)
