"""The operations of one warp on its part of an attention tile, unrolled at compile time.

A warp has `m_tiles` times 16 query rows. Registers have the layout of mma.sync m16n8k16 (PTX ISA, "Matrix fragments for
mma.m16n8k16"): of a 16 x 8 result a thread has rows `lane / 4` and `lane / 4 + 8`, columns `2 (lane % 4)` and the next. Scores
`s` are `[m_tiles, keys / 8, 4]`, sums `o` `[m_tiles, head_dim / 8, 4]`, in local arrays that the compiler keeps in registers,
since every index is a constant.
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

KEYS = 64  # keys per tile
LOG2_E = 1.4426950408889634


def sums_row(head_dim: int) -> int:
    """Return the bytes of a row of float32 sums in shared memory, padded so that eight rows are in different banks."""
    return 4 * head_dim + 32


@dataclass(frozen=True)
class TileOperations:
    """Intrinsics of one kind of tile; see `tile_operations`."""

    init: Callable[..., Any]
    qk_product: Callable[..., Any]
    apply_mask: Callable[..., Any]
    softmax_step: Callable[..., Any]
    pv_product: Callable[..., Any]
    store: Callable[..., Any]
    store_partial: Callable[..., Any]


def load(builder: Any, pointer: Any, count: int) -> list[Any]:
    """Read a local array, which the compiler keeps in registers."""
    return [builder.load(builder.gep(pointer, [ir.Constant(I32, i)])) for i in range(count)]


def save(builder: Any, pointer: Any, values: list[Any]) -> None:
    """Write a local array."""
    for i, value in enumerate(values):
        builder.store(value, builder.gep(pointer, [ir.Constant(I32, i)]))


def online_softmax_step(
    builder: Any, scores: list[Any], maxima: list[Any], totals: list[Any], factor: Any, m_tiles: int = 1
) -> list[Any]:
    """One step of the online softmax, in place: replace scores by weights, update the maxima and totals of the rows.

    Returns the factor of each row by which the sums of the earlier tiles must be multiplied (`rescale_rows`). `factor`
    is the scale times log2(e).
    """
    zero, minus_infinity = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
    columns, factors = len(scores) // (4 * m_tiles), []
    for m in range(m_tiles):
        for half in range(2):
            row = 2 * m + half
            indices = [(m * columns + column) * 4 + 2 * half + side for column in range(columns) for side in range(2)]
            maximum = maxima[row]
            for index in indices:
                maximum = ptx.maximum(builder, maximum, scores[index])
            for flip in (1, 2):
                maximum = ptx.maximum(builder, maximum, ptx.shuffle_xor(builder, maximum, flip))
            # The maximum of a row that has seen no key is minus infinity, which must not be subtracted from itself.
            base = builder.select(builder.fcmp_ordered("==", maximum, minus_infinity), zero, maximum)
            shift = builder.fsub(zero, builder.fmul(base, factor))
            # Exactly 1 if the maximum stays, so that tiles of which a row sees nothing, but another row of its block does, change no bit.
            rescale = ptx.exp2(builder, builder.fmul(builder.fsub(maxima[row], base), factor))
            step_total = zero
            for index in indices:
                scores[index] = ptx.exp2(builder, builder.fma(scores[index], factor, shift))
                step_total = builder.fadd(step_total, scores[index])
            totals[row] = builder.fma(totals[row], rescale, step_total)
            maxima[row] = maximum
            factors.append(rescale)
    return factors


def rescale_rows(builder: Any, sums: list[Any], factors: list[Any], m_tiles: int = 1) -> None:
    """Multiply each row of the sums by its factor of `online_softmax_step`, in place."""
    for index in range(len(sums)):
        row = index // (len(sums) // m_tiles) * 2 + index % 4 // 2
        sums[index] = builder.fmul(sums[index], factors[row])


def row_normalizer(builder: Any, row_sum: Any) -> Any:
    """Return the final factor on a row's sums: 1 / row_sum, or 1 for a row that saw no key, whose sums are zero."""
    zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
    return ptx.reciprocal(builder, builder.select(builder.fcmp_ordered("==", row_sum, zero), one, row_sum))


def transpose_across_four_lanes(builder: Any, column: Any, words: list[Any]) -> list[Any]:
    """Transpose four words across four neighbouring lanes, so that each can store 16 contiguous bytes.

    Lane `column` (0 to 3) gets word `column` of each of the four lanes, in lane order.
    """
    odd, late = (
        builder.icmp_unsigned("!=", builder.and_(column, ir.Constant(I32, bit)), ir.Constant(I32, 0)) for bit in (1, 2)
    )
    pairs = []
    for first, second in (words[:2], words[2:]):
        other = ptx.shuffle_xor(builder, builder.select(odd, first, second), 1)
        pairs.append((builder.select(odd, other, first), builder.select(odd, second, other)))
    others = [
        ptx.shuffle_xor(builder, builder.select(late, first, second), 2) for first, second in zip(*pairs, strict=True)
    ]
    front = [builder.select(late, other, own) for other, own in zip(others, pairs[0], strict=True)]
    return front + [builder.select(late, own, other) for other, own in zip(others, pairs[1], strict=True)]


def apply_softcap(builder: Any, value: Any, inner: Any, outer: Any) -> Any:
    """outer * tanh(inner * value), by tanh x = 1 - 2 / (1 + e^2x)."""
    one, two = ir.Constant(F32, 1.0), ir.Constant(F32, 2.0)
    power = ptx.exp2(builder, builder.fmul(builder.fmul(value, inner), ir.Constant(F32, 2 * LOG2_E)))
    tanh = builder.fsub(one, builder.fmul(two, ptx.reciprocal(builder, builder.fadd(one, power))))
    return builder.fmul(outer, tanh)


def statement(emit: Callable[..., None]) -> Callable[[Any, Any, Any, Any], Any]:
    """Return the codegen function of an intrinsic without a result; `emit` gets arrays as pointers to their first element."""

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
    """Return the operations of a warp on a tile of `16 * m_tiles` rows and `keys` keys.

    `head_dim` and `keys` are multiples of 16; `dtype` is "bfloat16" or "float16".
    """
    row_bytes = 2 * head_dim + 16  # 16 bytes of padding put eight rows in different banks
    columns, channels = keys // 8, head_dim // 8
    minus_infinity = ir.Constant(F32, float("-inf"))

    def at(builder: Any, address: Any, offset: int) -> Any:
        return builder.add(address, ir.Constant(I32, offset)) if offset else address

    def emit_init(builder: Any, o: Any, row_max: Any, row_sum: Any) -> None:
        zero = ir.Constant(F32, 0.0)
        save(builder, o, [zero] * (m_tiles * channels * 4))
        save(builder, row_max, [minus_infinity] * (2 * m_tiles))
        save(builder, row_sum, [zero] * (2 * m_tiles))

    def emit_qk_product(builder: Any, s: Any, q_address: Any, k_address: Any, inner: Any, outer: Any) -> None:
        sums = [[ir.Constant(F32, 0.0)] * 4 for _ in range(m_tiles * columns)]
        for step in range(head_dim // 16):
            queries = [
                ptx.load_matrices(builder, at(builder, q_address, m * 16 * row_bytes + step * 32))
                for m in range(m_tiles)
            ]
            for pair in range(columns // 2):
                key_fragments = ptx.load_matrices(builder, at(builder, k_address, pair * 16 * row_bytes + step * 32))
                for m in range(m_tiles):
                    for half in range(2):
                        index = m * columns + 2 * pair + half
                        sums[index] = ptx.multiply_add(
                            builder, dtype, queries[m], key_fragments[2 * half : 2 * half + 2], sums[index]
                        )
        values = [value for group in sums for value in group]
        if softcap:
            values = [apply_softcap(builder, value, inner, outer) for value in values]
        save(builder, s, values)

    def emit_apply_mask(builder: Any, s: Any, key: Any, row: Any, key_starts: Any, key_stops: Any) -> None:
        values = load(builder, s, m_tiles * columns * 4)
        for m in range(m_tiles):
            for half in range(2):
                offset = builder.mul(builder.add(row, ir.Constant(I32, m * 16 + half * 8)), ir.Constant(I32, 4))
                first = builder.sub(ptx.load_shared(builder, builder.add(key_starts, offset)), key)
                stop = builder.sub(ptx.load_shared(builder, builder.add(key_stops, offset)), key)
                for column in range(columns):
                    for side in range(2):
                        index = (m * columns + column) * 4 + 2 * half + side
                        key_offset = ir.Constant(I32, column * 8 + side)
                        seen = builder.and_(
                            builder.icmp_signed("<=", first, key_offset), builder.icmp_signed(">", stop, key_offset)
                        )
                        values[index] = builder.select(seen, values[index], minus_infinity)
        save(builder, s, values)

    def emit_softmax_step(builder: Any, s: Any, o: Any, row_max: Any, row_sum: Any, factor: Any) -> None:
        scores, sums = load(builder, s, m_tiles * columns * 4), load(builder, o, m_tiles * channels * 4)
        before, totals = load(builder, row_max, 2 * m_tiles), load(builder, row_sum, 2 * m_tiles)
        factors = online_softmax_step(builder, scores, before, totals, factor, m_tiles)
        rescale_rows(builder, sums, factors, m_tiles)
        save(builder, s, scores)
        save(builder, o, sums)
        save(builder, row_max, before)
        save(builder, row_sum, totals)

    def emit_pv_product(builder: Any, o: Any, s: Any, v_address: Any) -> None:
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

    def emit_store(
        builder: Any, o: Any, row_sum: Any, target: Any, stride: Any, row: Any, rows: Any, lane: Any
    ) -> None:
        sums, totals = load(builder, o, m_tiles * channels * 4), load(builder, row_sum, 2 * m_tiles)
        column = builder.and_(lane, ir.Constant(I32, 3))
        for m in range(m_tiles):
            for half in range(2):
                total = totals[2 * m + half]
                for flip in (1, 2):
                    total = builder.fadd(total, ptx.shuffle_xor(builder, total, flip))
                normalizer = row_normalizer(builder, total)
                words = []
                for channel in range(channels):
                    first = (m * channels + channel) * 4 + 2 * half
                    low, high = (builder.fmul(sums[first + side], normalizer) for side in range(2))
                    words.append(ptx.pack(builder, dtype, low, high))
                chunks = [words[first : first + 4] for first in range(0, channels // 4 * 4, 4)]
                chunks = [transpose_across_four_lanes(builder, column, chunk) for chunk in chunks]
                own_row = builder.add(row, ir.Constant(I32, m * 16 + half * 8))
                with builder.if_then(builder.icmp_signed("<", own_row, rows)):
                    start = builder.add(target, builder.mul(stride, builder.zext(own_row, ptx.I64)))
                    own = builder.add(start, builder.zext(builder.mul(column, ir.Constant(I32, 16)), ptx.I64))
                    for number, chunk in enumerate(chunks):
                        ptx.store_words(builder, builder.add(own, ir.Constant(ptx.I64, number * 64)), chunk)
                    own = builder.add(start, builder.zext(builder.mul(column, ir.Constant(I32, 4)), ptx.I64))
                    for number in range(4 * len(chunks), channels):
                        ptx.store_global(builder, builder.add(own, ir.Constant(ptx.I64, number * 16)), words[number])

    def emit_store_partial(
        builder: Any, o: Any, row_max: Any, row_sum: Any, sums_at: Any, stats_at: Any, rows: Any, lane: Any
    ) -> None:
        sums, maxima = load(builder, o, channels * 4), load(builder, row_max, 2)
        totals = load(builder, row_sum, 2)
        row = builder.lshr(lane, ir.Constant(I32, 2))
        column = builder.and_(lane, ir.Constant(I32, 3))
        for half in range(2):
            total = totals[half]
            for flip in (1, 2):
                total = builder.fadd(total, ptx.shuffle_xor(builder, total, flip))
            with builder.if_then(builder.icmp_signed("<", ir.Constant(I32, 8 * half), rows)):
                own_row = builder.add(row, ir.Constant(I32, 8 * half))
                start = builder.add(
                    builder.add(sums_at, builder.mul(own_row, ir.Constant(I32, sums_row(head_dim)))),
                    builder.mul(column, ir.Constant(I32, 8)),
                )
                for channel in range(channels):
                    first = channel * 4 + 2 * half
                    ptx.store_shared_floats(builder, at(builder, start, channel * 32), sums[first : first + 2])
                # The four lanes of a row have the same values and write the same.
                row_stats = builder.add(stats_at, builder.mul(own_row, ir.Constant(I32, 8)))
                ptx.store_shared_floats(builder, row_stats, [maxima[half], total])

    @intrinsic
    def init(typing_context, o, row_max, row_sum):
        """Set sums to zero and maxima to minus infinity."""
        return types.void(o, row_max, row_sum), statement(emit_init)

    @intrinsic
    def qk_product(typing_context, s, q_address, k_address, inner, outer):
        """s = q k^T for the tile in shared memory, or, with a softcap, outer * tanh(inner * q k^T)."""
        signature = types.void(s, types.uint32, types.uint32, types.float32, types.float32)
        return signature, statement(emit_qk_product)

    @intrinsic
    def apply_mask(typing_context, s, key, row, key_starts, key_stops):
        """Set the scores of keys outside their row's half-open interval to minus infinity.

        `key` is the key of the thread's first column, `row` its first row; `key_starts`, `key_stops` are shared-memory
        addresses of int32, one per row.
        """
        signature = types.void(s, types.int32, types.int32, types.uint32, types.uint32)
        return signature, statement(emit_apply_mask)

    @intrinsic
    def softmax_step(typing_context, s, o, row_max, row_sum, factor):
        """Online softmax step: turn scores into weights 2 ** (factor (s - maximum)) and rescale sums to the new maximum."""
        return types.void(s, o, row_max, row_sum, types.float32), statement(emit_softmax_step)

    @intrinsic
    def pv_product(typing_context, o, s, v_address):
        """o += p v, with the weights p in s."""
        return types.void(o, s, types.uint32), statement(emit_pv_product)

    @intrinsic
    def store(typing_context, o, row_sum, target, stride, row, rows, lane):
        """Write o / row_sum in the dtype to global memory, for rows below `rows`; zeros for rows that saw no key.

        `target` is the address of row 0, `stride` the bytes between rows, `row` the thread's first row.
        """
        signature = types.void(o, row_sum, types.uint64, types.uint64, types.int32, types.int32, types.int32)
        return signature, statement(emit_store)

    @intrinsic
    def store_partial(typing_context, o, row_max, row_sum, sums, stats, rows, lane):
        """Write 16 rows to shared memory, float32: sums, not yet divided by row_sum, and stats (maximum, row_sum).

        `sums` and `stats` are the addresses of row 0; a row of sums takes `sums_row(head_dim)` bytes. If `rows` is at
        most 8, only the first 8 rows are written.
        """
        address, number = types.uint32, types.int32
        return types.void(o, row_max, row_sum, address, address, number, number), statement(emit_store_partial)

    return TileOperations(init, qk_product, apply_mask, softmax_step, pv_product, store, store_partial)
