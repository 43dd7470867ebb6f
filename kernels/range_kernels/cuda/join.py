"""Split keys come together: partial softmax sums of a row, written by several blocks, join a running one.

The online softmax of `tile`, a part in place of a key: `total` and sums are weighed by 2 ** (factor (its maximum - the largest)).
Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from . import ptx
from .ptx import F32, I32, I64, types
from .tile import load, save, statement

PARTS = 8  # at once: all their loads are under way together


def _emit_join(
    builder: Any, sums: Any, running: Any, part: Any, far: Any, mark: Any, mark_far: Any, left: Any, factor: Any
) -> None:
    zero, nothing = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
    parts, tops, wholes = [], [], []
    for number in range(PARTS):
        here = builder.icmp_signed("<", ir.Constant(I32, number), left)
        index = builder.select(here, ir.Constant(I64, number), ir.Constant(I64, 0))
        at, mark_at = (builder.add(start, builder.mul(index, step)) for start, step in ((part, far), (mark, mark_far)))
        values, (top, whole) = ptx.load_fresh_floats(builder, at, 4), ptx.load_fresh_floats(builder, mark_at, 2)
        tops.append(builder.select(here, top, nothing))
        # Zero times what stands in another part's place would be NaN where that is infinite.
        parts.append([builder.select(here, value, zero) for value in values])
        wholes.append(builder.select(here, whole, zero))
    before, total = load(builder, running, 2)
    top = before
    for each in tops:
        top = ptx.maximum(builder, top, each)
    # Where no part has seen a key, minus infinity must not be subtracted from itself.
    base = builder.select(builder.fcmp_ordered("==", top, nothing), zero, top)
    shift = builder.fsub(zero, builder.fmul(base, factor))
    shrink, *shares = [ptx.exp2(builder, builder.fma(each, factor, shift)) for each in (before, *tops)]
    total = builder.fmul(total, shrink)
    for whole, share in zip(wholes, shares, strict=True):
        total = builder.fma(whole, share, total)
    save(builder, running, [top, total])
    joined = []
    for channel, value in enumerate(load(builder, sums, 4)):
        value = builder.fmul(value, shrink)
        for values, share in zip(parts, shares, strict=True):
            value = builder.fma(values[channel], share, value)
        joined.append(value)
    save(builder, sums, joined)


@intrinsic
def join_parts(typing_context, sums, running, part, far, mark, mark_far, left, factor):
    """Up to `PARTS` parts join; there are `left` of them.

    `running` holds the maximum and the total of what has been joined into the four `sums`. A part is four sums, `far` bytes from the
    next, its marks (maximum, total) `mark_far` bytes.
    """
    address = types.uint64
    return types.void(sums, running, *[address] * 4, types.int32, types.float32), statement(_emit_join)
