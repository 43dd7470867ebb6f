"""Softmax sums of parts come together: those of a block's warps, and of the blocks that share a sequence's keys.

A part of a row: sums, and beside them its marks, the largest score and the total of weights. Parts join as keys do in the online
softmax of `tile`: totals and sums are weighed by 2 ** (factor (the part's maximum - the largest)). Source: Flash-Decoding (Dao et
al. 2023). A thread joins four channels of a row: `running` holds maximum and total of what has been joined into its `four` sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import F32, I32, types
from .tile import load, save, share_of, statement

PARTS = 16  # at once: all their loads are under way together


def _emit_join(
    load_floats: Callable[[Any, Any, int], list[Any]], parts: int
) -> Callable[[Any, Any, Any, Any, Any, Any, Any, Any, Any], None]:
    """The code that joins up to `parts` parts, which `load_floats` reads."""

    def emit(
        builder: Any, four: Any, running: Any, part: Any, far: Any, mark: Any, mark_far: Any, left: Any, factor: Any
    ) -> None:
        zero, nothing = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
        sums, tops, totals = [], [], []
        for number in range(parts):
            here = builder.icmp_signed("<", ir.Constant(I32, number), left)
            index = builder.select(here, ir.Constant(part.type, number), ir.Constant(part.type, 0))
            at, mark_at = (
                builder.add(start, builder.mul(index, step)) for start, step in ((part, far), (mark, mark_far))
            )
            values, (top, total) = load_floats(builder, at, 4), load_floats(builder, mark_at, 2)
            tops.append(builder.select(here, top, nothing))
            # Zero times what stands in another part's place would be NaN where that is infinite.
            sums.append([builder.select(here, value, zero) for value in values])
            totals.append(builder.select(here, total, zero))
        before, whole = load(builder, running, 2)
        top = before
        for each in tops:
            top = ptx.maximum(builder, top, each)
        # Where no part has seen a key, minus infinity must not be subtracted from itself. A NaN total stays one.
        base = builder.select(builder.fcmp_ordered("==", top, nothing), zero, top)
        shift = builder.fsub(zero, builder.fmul(base, factor))
        shrink, *shares = [ptx.exp2(builder, builder.fma(each, factor, shift)) for each in (before, *tops)]
        whole = builder.fmul(whole, shrink)
        for total, share in zip(totals, shares, strict=True):
            whole = builder.fma(total, share, whole)
        save(builder, running, [top, whole])
        joined = []
        for channel, value in enumerate(load(builder, four, 4)):
            value = builder.fmul(value, shrink)
            for values, share in zip(sums, shares, strict=True):
                value = builder.fma(values[channel], share, value)
            joined.append(value)
        save(builder, four, joined)

    return emit


@intrinsic
def join_parts(typing_context, four, running, part, far, mark, mark_far, left, factor):
    """Up to `PARTS` parts in global memory join, of which there are `left`.

    A part is four sums, `far` bytes from the next; its marks (maximum, total) are `mark_far` bytes from the next.
    """
    signature = types.void(four, running, *[types.uint64] * 4, types.int32, types.float32)
    return signature, statement(_emit_join(ptx.load_fresh_floats, PARTS))


def make_join_of_warps(warps: int) -> Any:
    """The intrinsic that joins what so many warps left in shared memory; arguments as `join_parts` has them."""

    @intrinsic
    def join_warps(typing_context, four, running, part, far, mark, mark_far, factor):
        def emit(builder: Any, *args: Any) -> None:
            four, running, part, far, mark, mark_far, factor = args
            join = _emit_join(ptx.load_shared_floats, warps)
            join(builder, four, running, part, far, mark, mark_far, ir.Constant(I32, warps), factor)

        return types.void(four, running, *[types.uint32] * 4, types.float32), statement(emit)

    return join_warps


@intrinsic
def begin_join(typing_context, four, running):
    """No part has joined yet."""

    def emit(builder: Any, four: Any, running: Any) -> None:
        save(builder, four, [ir.Constant(F32, 0.0)] * 4)
        save(builder, running, [ir.Constant(F32, float("-inf")), ir.Constant(F32, 0.0)])

    return types.void(four, running), statement(emit)


@intrinsic
def write_part(typing_context, four, running, part, mark):
    """Leave what has been joined as a part of its own in global memory."""

    def emit(builder: Any, four: Any, running: Any, part: Any, mark: Any) -> None:
        ptx.store_floats(builder, part, load(builder, four, 4))
        ptx.store_floats(builder, mark, load(builder, running, 2))  # the threads of a row write the same

    return types.void(four, running, types.uint64, types.uint64), statement(emit)


def make_write_row(dtype: str) -> Any:
    """The intrinsic that writes four channels of a result in the dtype; zeros for a row that saw no key."""

    @intrinsic
    def write_row(typing_context, four, running, place):
        def emit(builder: Any, four: Any, running: Any, place: Any) -> None:
            share = share_of(builder, load(builder, running, 2)[1])
            values = [builder.fmul(value, share) for value in load(builder, four, 4)]
            words = [ptx.pack(builder, dtype, *values[at : at + 2]) for at in (0, 2)]
            ptx.store_words(builder, place, words)

        return types.void(four, running, types.uint64), statement(emit)

    return write_row
