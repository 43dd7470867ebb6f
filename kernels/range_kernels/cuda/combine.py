"""Combine partial softmax results: those of a block's warps, and those of the blocks that share a sequence's keys.

A partial result of a row has sums and stats: the largest score and the total of the weights. Partial results combine as keys do in
the online softmax of `warp_mma`: totals and sums are rescaled by 2 ** (factor (the part's maximum - the largest)). Source:
Flash-Decoding (Dao et al. 2023). A thread combines four channels of a row: `running` is the maximum and total of the parts that
its `four` sums contain so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import F32, I32, types
from .warp_mma import load, row_normalizer, save, statement

PARTS = 16  # combined at once: all their loads are in flight together


def _emit_combine(
    load_floats: Callable[[Any, Any, int], list[Any]], parts: int
) -> Callable[[Any, Any, Any, Any, Any, Any, Any, Any, Any], None]:
    """Return the code generator that combines up to `parts` parts, read by `load_floats`."""

    def emit(
        builder: Any,
        four: Any,
        running: Any,
        part: Any,
        part_step: Any,
        stats: Any,
        stats_step: Any,
        left: Any,
        factor: Any,
    ) -> None:
        zero, minus_infinity = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
        sums, maxima, totals = [], [], []
        for number in range(parts):
            present = builder.icmp_signed("<", ir.Constant(I32, number), left)
            index = builder.select(present, ir.Constant(part.type, number), ir.Constant(part.type, 0))
            at, stats_at = (
                builder.add(start, builder.mul(index, step)) for start, step in ((part, part_step), (stats, stats_step))
            )
            values, (maximum, total) = load_floats(builder, at, 4), load_floats(builder, stats_at, 2)
            maxima.append(builder.select(present, maximum, minus_infinity))
            # Selected, not multiplied by zero: a missing part reads part 0, and zero times infinity is NaN.
            sums.append([builder.select(present, value, zero) for value in values])
            totals.append(builder.select(present, total, zero))
        old_maximum, running_total = load(builder, running, 2)
        maximum = old_maximum
        for each in maxima:
            maximum = ptx.maximum(builder, maximum, each)
        # If no part has seen a key, minus infinity must not be subtracted from itself. A NaN total stays NaN.
        base = builder.select(builder.fcmp_ordered("==", maximum, minus_infinity), zero, maximum)
        shift = builder.fsub(zero, builder.fmul(base, factor))
        rescale, *factors = [ptx.exp2(builder, builder.fma(each, factor, shift)) for each in (old_maximum, *maxima)]
        running_total = builder.fmul(running_total, rescale)
        for total, weight in zip(totals, factors, strict=True):
            running_total = builder.fma(total, weight, running_total)
        save(builder, running, [maximum, running_total])
        combined = []
        for channel, value in enumerate(load(builder, four, 4)):
            value = builder.fmul(value, rescale)
            for values, weight in zip(sums, factors, strict=True):
                value = builder.fma(values[channel], weight, value)
            combined.append(value)
        save(builder, four, combined)

    return emit


@intrinsic
def combine_partials(typing_context, four, running, part, part_step, stats, stats_step, left, factor):
    """Combine the next partial results, up to `PARTS` of the `left` that remain, into `four` and `running`.

    `part` is the global address of the first part's four sums, `stats` that of its maximum and total; the next part is
    `part_step` and `stats_step` bytes further. `factor` is the scale times log2(e).
    """
    signature = types.void(four, running, *[types.uint64] * 4, types.int32, types.float32)
    return signature, statement(_emit_combine(ptx.load_fresh_floats, PARTS))


def make_combine_warps(warps: int) -> Any:
    """Return the intrinsic that combines the parts of `warps` warps in shared memory; arguments as in `combine_partials`."""

    @intrinsic
    def combine_warps(typing_context, four, running, part, part_step, stats, stats_step, factor):
        def emit(builder: Any, *args: Any) -> None:
            four, running, part, part_step, stats, stats_step, factor = args
            combine = _emit_combine(ptx.load_shared_floats, warps)
            combine(builder, four, running, part, part_step, stats, stats_step, ir.Constant(I32, warps), factor)

        return types.void(four, running, *[types.uint32] * 4, types.float32), statement(emit)

    return combine_warps


@intrinsic
def init_combine(typing_context, four, running):
    """Initialise `four` and `running` before the first part."""

    def emit(builder: Any, four: Any, running: Any) -> None:
        save(builder, four, [ir.Constant(F32, 0.0)] * 4)
        save(builder, running, [ir.Constant(F32, float("-inf")), ir.Constant(F32, 0.0)])

    return types.void(four, running), statement(emit)


@intrinsic
def write_partial(typing_context, four, running, part, stats):
    """Write the combined sums and stats to global memory, as one part for a later `combine_partials`."""

    def emit(builder: Any, four: Any, running: Any, part: Any, stats: Any) -> None:
        ptx.store_floats(builder, part, load(builder, four, 4))
        ptx.store_floats(builder, stats, load(builder, running, 2))  # all threads of a row write the same values

    return types.void(four, running, types.uint64, types.uint64), statement(emit)


def make_write_row(dtype: str) -> Any:
    """Return the intrinsic that writes four sums, divided by their total, in the dtype; zeros if no key was seen."""

    @intrinsic
    def write_row(typing_context, four, running, target):
        def emit(builder: Any, four: Any, running: Any, target: Any) -> None:
            normalizer = row_normalizer(builder, load(builder, running, 2)[1])
            values = [builder.fmul(value, normalizer) for value in load(builder, four, 4)]
            words = [ptx.pack(builder, dtype, *values[at : at + 2]) for at in (0, 2)]
            ptx.store_words(builder, target, words)

        return types.void(four, running, types.uint64), statement(emit)

    return write_row
