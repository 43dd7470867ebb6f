"""Intrinsics that load and store one or eight numbers of a dtype as float32; stores round to nearest.

Loads are plain ones: a kernel may read what the same thread wrote.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from .ptx import F32, FLOATS, I32, I64, VOID, asm, exp2, pack, shuffle_xor, types

EIGHT = types.UniTuple(types.float32, 8)
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _unpack(builder: Any, word: Any, dtype: str) -> list[Any]:
    """The two numbers of a register."""
    if dtype == "bfloat16":
        low, high = builder.shl(word, ir.Constant(I32, 16)), builder.and_(word, ir.Constant(I32, -65536))
        return [builder.bitcast(low, F32), builder.bitcast(high, F32)]
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    out = asm(builder, ir.LiteralStructType([F32] * 2), [word], text, "=f,=f,r", False)
    return [builder.extract_value(out, number) for number in range(2)]


def _load_eight(dtype: str) -> Any:
    def emit(builder: Any, address: Any) -> list[Any]:
        words = []
        for first in range(0, 8 if dtype == "float32" else 4, 4):
            at = builder.add(address, ir.Constant(I64, 4 * first))
            out = asm(
                builder,
                ir.LiteralStructType([I32] * 4),
                [at],
                "ld.global.v4.b32 {$0,$1,$2,$3}, [$4];",
                "=r,=r,=r,=r,l,~{memory}",
            )
            words += [builder.extract_value(out, number) for number in range(4)]
        if dtype == "float32":
            return [builder.bitcast(word, F32) for word in words]
        return [value for word in words for value in _unpack(builder, word, dtype)]

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.make_tuple(builder, signature.return_type, emit(builder, *args))

        return EIGHT(types.uint64), codegen

    return load


def _store_eight(dtype: str) -> Any:
    def emit(builder: Any, address: Any, values: list[Any]) -> None:
        if dtype == "float32":
            words = [builder.bitcast(value, I32) for value in values]
        else:
            words = [pack(builder, dtype, *values[first : first + 2]) for first in range(0, 8, 2)]
        for first in range(0, len(words), 4):
            at = builder.add(address, ir.Constant(I64, 4 * first))
            text = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
            asm(builder, VOID, [at, *words[first : first + 4]], text, "l,r,r,r,r,~{memory}")

    @intrinsic
    def store(typing_context: Any, address: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, args[0], [builder.extract_value(args[1], number) for number in range(8)])
            return context.get_dummy_value()

        return types.void(types.uint64, EIGHT), codegen

    return store


def _load_one(dtype: str) -> Any:
    texts = {
        "float32": "ld.global.f32 $0, [$1];",
        "float16": "{ .reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.f16 $0, h; }",
        "bfloat16": "{ .reg .b16 h, z; mov.b16 z, 0; ld.global.b16 h, [$1]; mov.b32 $0, {z, h}; }",
    }

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return asm(builder, F32, args, texts[dtype], "=f,l,~{memory}")

        return types.float32(types.uint64), codegen

    return load


def _store_one(dtype: str) -> Any:
    texts = {
        "float32": "st.global.f32 [$0], $1;",
        "float16": "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }",
        "bfloat16": "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
    }

    @intrinsic
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            asm(builder, VOID, args, texts[dtype], "l,f,~{memory}")
            return context.get_dummy_value()

        return types.void(types.uint64, types.float32), codegen

    return store


def _round(dtype: str) -> Any:
    texts = {
        "float32": "mov.f32 $0, $1;",
        "float16": "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h; }",
        "bfloat16": "{ .reg .b16 h, z; mov.b16 z, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {z, h}; }",
    }

    @intrinsic
    def rounded(typing_context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return asm(builder, F32, args, texts[dtype], "=f,f", False)

        return types.float32(types.float32), codegen

    return rounded


@intrinsic
def warp_sum(typing_context: Any, value: Any) -> Any:
    """The sum of a float32 over the 32 lanes of a warp, in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (total,) = args
        for flip in (16, 8, 4, 2, 1):
            total = builder.fadd(total, shuffle_xor(builder, total, flip))
        return total

    return types.float32(types.float32), codegen


def _times_sigmoid(builder: Any, x: Any, z: Any) -> Any:
    """x / (1 + exp(-z)), to about 4 units in the last place."""
    power = exp2(builder, builder.fmul(z, ir.Constant(F32, -1.4426950216293335)))
    return builder.fdiv(x, builder.fadd(ir.Constant(F32, 1.0), power))


@intrinsic
def silu(typing_context: Any, value: Any) -> Any:
    """x / (1 + exp(-x)) of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _times_sigmoid(builder, args[0], args[0])

    return types.float32(types.float32), codegen


@intrinsic
def gelu_tanh(typing_context: Any, value: Any) -> Any:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) of a float32; 0.5 (1 + tanh y) is 1 / (1 + exp(-2 y))."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        cube = builder.fmul(builder.fmul(x, x), builder.fmul(x, ir.Constant(F32, 0.04471499845385551)))
        inner = builder.fmul(builder.fadd(x, cube), ir.Constant(F32, 1.595769166946411))
        return _times_sigmoid(builder, x, inner)

    return types.float32(types.float32), codegen


@intrinsic
def inverse_root(typing_context: Any, value: Any) -> Any:
    """1 / sqrt(x) of a float32, correctly rounded twice."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        root = asm(builder, F32, args, "sqrt.rn.f32 $0, $1;", "=f,f", False)
        return builder.fdiv(ir.Constant(F32, 1.0), root)

    return types.float32(types.float32), codegen


load_eight = {dtype: _load_eight(dtype) for dtype in FLOATS}
store_eight = {dtype: _store_eight(dtype) for dtype in FLOATS}
load_one = {dtype: _load_one(dtype) for dtype in FLOATS}
store_one = {dtype: _store_one(dtype) for dtype in FLOATS}
round_to = {dtype: _round(dtype) for dtype in FLOATS}
"""The float32 that a number has after it was rounded to a dtype."""
