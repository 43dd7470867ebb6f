"""SIMD operations of the CPU kernels, emitted as LLVM vectors for Numba's CPU target.

Numba's own loops reach about 40 GFLOP/s per pair of cores because the accumulators of a small matrix product go through
memory. `block_product` and `block_product_sum` keep a tile of C in registers:

    C[ROWS, COLUMNS] = or +=  A[ROWS, depth] @ B[depth, COLUMNS]

`row_product` and `row_product_sum` are the same for one row of A, and those with `_bf16` take B in bfloat16, which float32 represents
exactly; all with the same bits. All other operands are float32 addresses with a row stride in elements; B is read COLUMNS at a time, so callers pack B into panels
of COLUMNS columns (stride COLUMNS), which keeps a panel in the L1 cache. `row_maximum` and `row_exp2` are the two
passes of a softmax row; LLVM's own vectoriser would use half the register width and not vectorise a maximum that may see NaN.
"""

from __future__ import annotations

import hashlib
import math
import platform
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _tile() -> tuple[int, int]:
    """Return (floats in a vector, rows of the tile) so that tile, B row and one broadcast fit the register file."""
    features = getattr(config, "CPU_FEATURES", None) or llvm.get_host_cpu_features().flatten()
    if "+avx512f" in features:
        return 16, 8  # 16 of 32 zmm hold the tile
    if "+neon" in features or platform.machine() in ("aarch64", "arm64"):
        return 4, 8  # 16 of 32
    return (8, 4) if "+avx2" in features else (4, 4)  # 8 of 16


WIDTH, ROWS = _tile()
COLUMNS = 2 * WIDTH
DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
_VECTOR = ir.VectorType(_F32, WIDTH)


def _broadcast(builder, value):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    lane0 = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


@intrinsic
def halves_at(typing_context, address):
    """A pointer to the 16-bit integers at `address`, for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.PointerType(_I16))

    return types.CPointer(types.uint16)(types.intp), codegen


@intrinsic
def floats_at(typing_context, address):
    """A pointer to the float32 numbers at `address`, for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.PointerType(_F32))

    return types.CPointer(types.float32)(types.intp), codegen


def _integer_at(builder, address):
    return builder.inttoptr(address, ir.PointerType(_I64))


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the int64 at `address`; return what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _integer_at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_load(typing_context, address):
    """The int64 at `address`; what other threads wrote before they changed it can be read afterwards."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_integer_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def atomic_replace(typing_context, address, old, new):
    """Replace the int64 at `address` by `new` if it is `old`; return whether it was."""

    def codegen(context, builder, signature, args):
        result = builder.cmpxchg(_integer_at(builder, args[0]), args[1], args[2], "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.intp, types.int64, types.int64), codegen


@intrinsic
def spin(typing_context):
    """Tell the processor that this thread waits in a loop."""

    def codegen(context, builder, signature, args):
        machine, void = platform.machine().lower(), ir.VoidType()
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(void, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(void, [_I32])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint"), [_I32(1)])  # yield
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def let_others_run(typing_context):
    """Give the core to another thread that could run, if the system has a call for it."""

    def codegen(context, builder, signature, args):
        if platform.system() != "Windows":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


AHEAD = 64


def prefetch(builder, place):
    """Prefetch a cache line into all levels of the cache.

    Not with the hint "used once" (locality 0): Intel's servers then fetch past the L2 cache, so a panel of weights came from memory
    again for every tile, and a product of 1,024 rows took three times as long.
    """
    byte = ir.PointerType(ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(place, byte), _I32(0), _I32(3), _I32(1)])


def _make_product(rows: int, add: bool, bf16: bool = False):
    """The product of `rows` rows is added to C, once it is summed up, or C is only written; B is float32, or bfloat16."""

    @intrinsic
    def product(typing_context, a, stride_a, b, stride_b, c, stride_c, depth):
        signature = types.void(types.uintp, types.intp, types.uintp, types.intp, types.uintp, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            a, stride_a, b, stride_b, c, stride_c, depth = args
            scalar, vector = ir.PointerType(_F32), ir.PointerType(_VECTOR)
            a, b, c = (builder.inttoptr(x, scalar) for x in (a, b, c))

            def load_vector(base, element):
                value = builder.load(builder.bitcast(builder.gep(base, [element]), vector))
                value.align = 4
                return value

            def load_b(element):
                if not bf16:
                    return load_vector(b, element)
                place = builder.gep(builder.bitcast(b, ir.PointerType(_I16)), [element])
                value = builder.load(builder.bitcast(place, ir.PointerType(ir.VectorType(_I16, WIDTH))))
                value.align = 2
                integers = ir.VectorType(_I32, WIDTH)
                wide = builder.shl(builder.zext(value, integers), ir.Constant(integers, [16] * WIDTH))
                return builder.bitcast(wide, _VECTOR)

            def prefetch_b(element):
                kind = ir.PointerType(_I16 if bf16 else _F32)
                prefetch(builder, builder.gep(builder.bitcast(b, kind), [element]))

            def tile_element(row, part):
                return builder.add(builder.mul(stride_c, _I64(row)), _I64(part * WIDTH))

            tile = [(row, part) for row in range(rows) for part in range(2)]
            start = [ir.Constant(_VECTOR, [0.0] * WIDTH)] * len(tile)
            before = builder.block
            loop = builder.append_basic_block("product.loop")
            done = builder.append_basic_block("product.done")
            builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, done)

            builder.position_at_end(loop)
            step = builder.phi(_I64)
            step.add_incoming(_I64(0), before)
            sums = [builder.phi(_VECTOR) for _ in tile]
            for phi, value in zip(sums, start, strict=True):
                phi.add_incoming(value, before)
            b_row = builder.mul(step, stride_b)
            b_parts = [load_b(builder.add(b_row, _I64(part * WIDTH))) for part in range(2)]
            prefetch_b(builder.add(b_row, _I64(AHEAD * COLUMNS)))
            if not bf16:  # a row of B is two cache lines
                prefetch_b(builder.add(b_row, _I64(AHEAD * COLUMNS + WIDTH)))
            new = []
            for row in range(rows):
                element = builder.add(builder.mul(stride_a, _I64(row)), step)
                a_value = _broadcast(builder, builder.load(builder.gep(a, [element])))
                for part in range(2):
                    term = builder.fmul(a_value, b_parts[part], flags=("contract",))
                    new.append(builder.fadd(sums[len(new)], term, flags=("contract",)))
            following = builder.add(step, _I64(1))
            step.add_incoming(following, loop)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            for index in range(len(tile)):
                value = builder.phi(_VECTOR)
                value.add_incoming(start[index], before)
                value.add_incoming(new[index], loop)
                start[index] = value
            for value, (row, part) in zip(start, tile, strict=True):
                if add:
                    value = builder.fadd(load_vector(c, tile_element(row, part)), value)
                address = builder.bitcast(builder.gep(c, [tile_element(row, part)]), vector)
                builder.store(value, address).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return product


block_product = _make_product(ROWS, add=False)
block_product_sum = _make_product(ROWS, add=True)  # a long sum of shorter sums has less rounding error
row_product = _make_product(1, add=False)
row_product_sum = _make_product(1, add=True)
block_product_bf16 = _make_product(ROWS, add=False, bf16=True)
block_product_sum_bf16 = _make_product(ROWS, add=True, bf16=True)
row_product_bf16 = _make_product(1, add=False, bf16=True)
row_product_sum_bf16 = _make_product(1, add=True, bf16=True)


@intrinsic
def widen_bf16(typing_context, source, target, count):
    """Convert `count` numbers (a multiple of WIDTH) from bfloat16 at address `source` to float32 at `target`."""

    def codegen(context, builder, signature, args):
        halves, integers = ir.VectorType(_I16, WIDTH), ir.VectorType(_I32, WIDTH)
        source, target = (
            builder.inttoptr(at, ir.PointerType(kind)) for at, kind in zip(args[:2], (_I16, _I32), strict=True)
        )
        with cgutils.for_range_slice(builder, _I64(0), args[2], _I64(WIDTH)) as (element, _):
            value = builder.load(builder.bitcast(builder.gep(source, [element]), ir.PointerType(halves)))
            value.align = 2
            wide = builder.shl(builder.zext(value, integers), ir.Constant(integers, [16] * WIDTH))
            builder.store(wide, builder.bitcast(builder.gep(target, [element]), ir.PointerType(integers))).align = 4
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), codegen


def _each_pair_of_vectors(builder, address, count, start, body):
    """Loop over `count` floats (a multiple of COLUMNS), two vectors per iteration; `body(vectors, carried) -> (vectors or None,
    carried)`. Return the carried pair of vectors."""
    base = builder.inttoptr(address, ir.PointerType(_F32))
    before = builder.block
    loop = builder.append_basic_block("row.loop")
    done = builder.append_basic_block("row.done")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), loop, done)
    builder.position_at_end(loop)
    element = builder.phi(_I64)
    element.add_incoming(_I64(0), before)
    carried = [builder.phi(_VECTOR) for _ in range(2)]
    for phi in carried:
        phi.add_incoming(start, before)
    addresses = [
        builder.bitcast(builder.gep(base, [builder.add(element, _I64(part * WIDTH))]), ir.PointerType(_VECTOR))
        for part in range(2)
    ]
    loaded = [builder.load(address) for address in addresses]
    for value in loaded:
        value.align = 4
    stored, new = body(loaded, carried)
    for value, address in zip(stored or (), addresses, strict=False):
        builder.store(value, address).align = 4
    following = builder.add(element, _I64(COLUMNS))
    element.add_incoming(following, loop)
    for phi, value in zip(carried, new, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    results = []
    for value in new:
        phi = builder.phi(_VECTOR)
        phi.add_incoming(start, before)
        phi.add_incoming(value, loop)
        results.append(phi)
    return results


def _splat(value: float):
    return ir.Constant(_VECTOR, [value] * WIDTH)


def _fold(builder, vectors, combine):
    """Combine two vectors and then their lanes, always in the same order."""
    both = combine(*vectors)
    lanes = [builder.extract_element(both, _I32(lane)) for lane in range(WIDTH)]
    while len(lanes) > 1:
        lanes = [combine(lanes[i], lanes[i + 1]) for i in range(0, len(lanes), 2)]
    return lanes[0]


@intrinsic
def row_maximum(typing_context, address, count):
    """Largest of `count` floats (a multiple of COLUMNS) at `address`; NaN is ignored."""

    def codegen(context, builder, signature, args):
        def larger(x, y):
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        def body(loaded, carried):
            return None, [larger(x, most) for x, most in zip(loaded, carried, strict=True)]

        return _fold(builder, _each_pair_of_vectors(builder, *args, _splat(-3.0e38), body), larger)

    return types.float32(types.uintp, types.intp), codegen


# Minimax polynomial of 2**x on [-0.5, 0.5], relative error 3e-7 in float32 with the constant set to 1.
_EXP2 = (1.0, 6.93146944e-1, 2.40221202e-1, 5.55071346e-2, 9.67554096e-3, 1.32764527e-3)


def _exp2(builder, x):
    """2**x of a vector, x <= 0; exactly 0 below -126.5, NaN stays NaN."""
    integers = ir.VectorType(_I32, WIDTH)
    floor_type = ir.FunctionType(_VECTOR, [_VECTOR])
    floor = cgutils.get_or_insert_function(builder.module, floor_type, f"llvm.floor.v{WIDTH}f32")
    lowest = _splat(-127.0)  # exponent bits 0
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    whole = builder.call(floor, [builder.fadd(x, _splat(0.5))])
    part = builder.fsub(x, whole)
    value = _splat(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        product = builder.fmul(value, part, flags=("contract",))
        value = builder.fadd(product, _splat(coefficient), flags=("contract",))
    exponent = builder.add(builder.fptosi(whole, integers), ir.Constant(integers, [127] * WIDTH))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(integers, [23] * WIDTH)), _VECTOR)
    return builder.fmul(value, power)


@intrinsic
def row_exp2(typing_context, address, count, largest):
    """Replace `count` floats x (a multiple of COLUMNS) at `address` by `2**(x - largest)`; return their sum."""

    def codegen(context, builder, signature, args):
        address, count, largest = args
        shift = _broadcast(builder, largest)

        def body(loaded, carried):
            weights = [_exp2(builder, builder.fsub(x, shift)) for x in loaded]
            return weights, [builder.fadd(total, weight) for total, weight in zip(carried, weights, strict=True)]

        totals = _each_pair_of_vectors(builder, address, count, _splat(0.0), body)
        return _fold(builder, totals, builder.fadd)

    return types.float32(types.uintp, types.intp, types.float32), codegen


# exp(x) = 2**n * exp(r) with r = x - n * ln 2 in two parts, the first exact in float32 times a small whole n; exp(r) by its
# series on [-ln2 / 2, ln2 / 2], whose first missing term is 5e-9.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = tuple(1.0 / math.factorial(power) for power in range(8))


def _exp(builder, x):
    """exp of a vector, x <= 0, accurate to one rounding; 0 below -87; NaN stays NaN."""
    integers = ir.VectorType(_I32, WIDTH)
    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), f"llvm.floor.v{WIDTH}f32"
    )
    tiny = builder.fcmp_ordered("<", x, _splat(-87.0))
    x = builder.select(tiny, _splat(-87.0), x)
    whole = builder.call(floor, [builder.fadd(builder.fmul(x, _splat(1.0 / math.log(2.0))), _splat(0.5))])
    rest = builder.fsub(builder.fsub(x, builder.fmul(whole, _splat(_LN2_HIGH))), builder.fmul(whole, _splat(_LN2_LOW)))
    value = _splat(_EXP[-1])
    for coefficient in _EXP[-2::-1]:
        product = builder.fmul(value, rest, flags=("contract",))
        value = builder.fadd(product, _splat(coefficient), flags=("contract",))
    exponent = builder.add(builder.fptosi(whole, integers), ir.Constant(integers, [127] * WIDTH))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(integers, [23] * WIDTH)), _VECTOR)
    return builder.select(tiny, _splat(0.0), builder.fmul(value, power))


def _make_row_gate(curve):
    """`curve(builder, x)` is s in the activation x * sigmoid(s)."""

    @intrinsic
    def row_gate(typing_context, gate, up, out, count):
        """out = activation(gate) * up for `count` floats (a multiple of COLUMNS) at three addresses."""
        signature = types.void(types.uintp, types.uintp, types.uintp, types.intp)

        def codegen(context, builder, signature, args):
            bases = [builder.inttoptr(address, ir.PointerType(_F32)) for address in args[:3]]
            with cgutils.for_range_slice(builder, _I64(0), args[3], _I64(WIDTH)) as (element, _):
                places = [builder.bitcast(builder.gep(base, [element]), ir.PointerType(_VECTOR)) for base in bases]
                gate, up = (builder.load(place) for place in places[:2])
                gate.align = up.align = 4
                s = curve(builder, gate)
                negative = builder.fcmp_ordered("<", s, _splat(0.0))
                small = _exp(builder, builder.select(negative, s, builder.fsub(_splat(-0.0), s)))
                above = builder.select(negative, small, _splat(1.0))  # sigmoid = above / (1 + small)
                sigmoid = builder.fdiv(above, builder.fadd(_splat(1.0), small))
                builder.store(builder.fmul(builder.fmul(gate, sigmoid), up), places[2]).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return row_gate


def _gelu_curve(builder, x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x**3) (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    cube = builder.fmul(builder.fmul(x, x), x)
    inner = builder.fadd(x, builder.fmul(_splat(0.044715), cube))
    return builder.fmul(_splat(2.0 * math.sqrt(2.0 / math.pi)), inner)


row_gate_silu = _make_row_gate(lambda builder, x: x)
row_gate_gelu_tanh = _make_row_gate(_gelu_curve)
