"""Intrinsics of the CUDA kernels, in LLVM and inline PTX, with stand-ins for the simulator.

Those of Hopper only are in `ptx_sm90`. Functions with a `builder` generate code inside other intrinsics and take LLVM
values; the rest are called in kernels. Global addresses are uint64, shared-memory addresses uint32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.core import config

SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))

if SIMULATED:

    @cuda.jit(device=True)
    def float_from_bits(bits):
        """Reinterpret int32 bits as float32."""
        return np.int32(bits).view(np.float32)

    @cuda.jit(device=True)
    def bits_from_float(value):
        """Reinterpret a float32 as its int32 bits."""
        return np.float32(value).view(np.int32)

    def copy_16_bytes(target, source, step):
        """Raise NotImplementedError: the simulator has no addresses, so it runs only kernels that take arrays."""
        raise NotImplementedError

    fill_16_bytes = copy_2_times_16_bytes = load_int = load_long = copy_16_bytes
    convert_16_bytes: Any = {}
    types: Any = None

else:
    from llvmlite import ir
    from numba.cuda import types as _types
    from numba.cuda.extending import intrinsic

    types = _types  # type checkers see the simulator's types, which lack most of these

    @intrinsic
    def float_from_bits(typing_context, bits):
        """Reinterpret int32 bits as float32."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.FloatType())

        return types.float32(types.int32), codegen

    @intrinsic
    def bits_from_float(typing_context, value):
        """Reinterpret a float32 as its int32 bits."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.IntType(32))

        return types.int32(types.float32), codegen


if not SIMULATED:
    I32, I64, F32, VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
    SHORT = {"bfloat16": "bf16", "float16": "f16"}

    def asm(builder, returns, operands, text, constraints, side_effect=True):
        """Emit inline PTX and return its result, of LLVM type `returns`; `operands` are LLVM values for `$0`, `$1`, ...

        `constraints` is LLVM's constraint string. Without `side_effect` the compiler may move or remove the code.
        """
        kind = ir.FunctionType(returns, [operand.type for operand in operands])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=side_effect), operands)

    def load_matrices(builder, address, transposed=False):
        """ldmatrix: load four 8 x 8 matrices of 16-bit numbers from shared memory, into four registers per thread."""
        kind = ".trans" if transposed else ""
        text = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
        out = asm(builder, ir.LiteralStructType([I32] * 4), [address], text, "=r,=r,=r,=r,r,~{memory}")
        return [builder.extract_value(out, i) for i in range(4)]

    def multiply_add(builder, dtype, a, b, c):
        """mma.sync m16n8k16: c + a b with float32 sums; a is four registers, b two, c and the result four floats."""
        short = SHORT[dtype]
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$0,$1,$2,$3};"
        )
        out = asm(
            builder, ir.LiteralStructType([F32] * 4), [*a, *b, *c], text, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", False
        )
        return [builder.extract_value(out, i) for i in range(4)]

    def exp2(builder, x):
        """2 ** x, to 2 units in the last place; 0 for minus infinity."""
        return asm(builder, F32, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f", False)

    def reciprocal(builder, x):
        """1 / x in float32, approximate; denormals count as zero."""
        return asm(builder, F32, [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f", False)

    def maximum(builder, a, b):
        """The larger of two float32; if one is NaN, the other."""
        return asm(builder, F32, [a, b], "max.f32 $0, $1, $2;", "=f,f,f", False)

    def shuffle_xor(builder, x, flip):
        """Return x of the lane whose number differs in the bits of `flip`."""
        kind = "f" if x.type == F32 else "r"
        return asm(builder, x.type, [x], f"shfl.sync.bfly.b32 $0, $1, {flip}, 31, -1;", f"={kind},{kind}")

    def pack(builder, dtype, low, high):
        """Round two float32 to 16-bit floats and pack them into one register, `low` in its lower half."""
        return asm(builder, I32, [high, low], f"cvt.rn.{SHORT[dtype]}x2.f32 $0, $1, $2;", "=r,f,f", False)

    def load_shared(builder, address):
        """Load an int32 from shared memory."""
        return asm(builder, I32, [address], "ld.shared.b32 $0, [$1];", "=r,r,~{memory}")

    def store_global(builder, address, value):
        """Store a 32-bit register to global memory."""
        asm(builder, VOID, [address, value], "st.global.b32 [$0], $1;", "l,r,~{memory}")

    def _statement(text, *kinds):
        """An intrinsic that runs one instruction and returns nothing."""
        letters = {types.uint32: "r", types.int32: "r", types.uint64: "l", types.float32: "f"}
        constraints = ",".join([*(letters[kind] for kind in kinds), "~{memory}"])

        def codegen(context, builder, signature, args):
            asm(builder, VOID, args, text, constraints)
            return context.get_dummy_value()

        if len(kinds) == 3:

            @intrinsic
            def statement(typing_context, a, b, c):
                return types.void(*kinds), codegen
        elif len(kinds) == 2:

            @intrinsic
            def statement(typing_context, a, b):
                return types.void(*kinds), codegen
        elif len(kinds) == 1:

            @intrinsic
            def statement(typing_context, a):
                return types.void(*kinds), codegen
        else:

            @intrinsic
            def statement(typing_context):
                return types.void(), codegen

        return statement

    def copy_async(builder, target, offset, source, size):
        """cp.async: start a copy of 16 bytes from global memory at `source` to shared memory at `target + offset`.

        Only the first `size` bytes are read; the others are filled with zeros.
        """
        text = f"cp.async.cg.shared.global.L2::128B [$0 + {offset}], [$1], 16, $2;"
        asm(builder, VOID, [target, source, size], text, "r,l,r,~{memory}")

    prefetch = _statement("prefetch.global.L1 [$0];", types.uint64)
    copies_commit = _statement("cp.async.commit_group;")
    # `copies_wait_but[n]` waits until at most the `n` latest committed groups of this thread's copies are still in
    # flight.
    copies_wait_but = {count: _statement(f"cp.async.wait_group {count};") for count in (0, 1, 3)}
    copies_wait_all = copies_wait_but[0]

    @intrinsic
    def shared_address(typing_context, array):
        """Return the 32-bit address of a shared array, as shared-memory instructions take it."""

        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
            return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(ir.IntType(8), addrspace=3)), I32)

        return types.uint32(array), codegen

    def move(builder, target, source, step, pieces=1):
        """Copy `pieces` 16-byte chunks, `step` bytes apart, between global addresses; all loads precede the stores."""
        loads, stores, names = [], [], []
        for piece in range(pieces):
            regs = ", ".join(f"{letter}{piece}" for letter in "abcd")
            names.append(regs)
            loads.append(f"ld.global.nc.L1::no_allocate.v4.b32 {{{regs}}}, [s];")
            stores.append(f"st.global.v4.b32 [t], {{{regs}}};")
        text = (
            f"{{ .reg .b32 {', '.join(names)}; .reg .b64 s, t; mov.b64 t, $0; mov.b64 s, $1; "
            + " add.u64 s, s, $2; ".join(loads)
            + " "
            + " add.u64 t, t, $2; ".join(stores)
            + " }"
        )
        asm(builder, VOID, [target, source, step], text, "l,l,l,~{memory}")

    def _copies(pieces):
        @intrinsic
        def copies(typing_context, target, source, step):
            """`move` as an intrinsic for kernels."""

            def codegen(context, builder, signature, args):
                move(builder, *args, pieces)
                return context.get_dummy_value()

            return types.void(types.uint64, types.uint64, types.uint64), codegen

        return copies

    copy_16_bytes, copy_2_times_16_bytes = _copies(1), _copies(2)

    def _loads(kind, letter, size):
        @intrinsic
        def load(typing_context, address):
            def codegen(context, builder, signature, args):
                whole = ir.IntType(8 * size)
                return asm(builder, whole, args, f"ld.global.nc.b{8 * size} $0, [$1];", f"={letter},l", False)

            return kind(types.uint64), codegen

        return load

    def _function(returns, kinds, text, constraints, side_effect):
        """An intrinsic that runs one instruction and returns its result."""

        def codegen(context, builder, signature, args):
            return asm(builder, context.get_value_type(returns), args, text, constraints, side_effect)

        if len(kinds) == 1:

            @intrinsic
            def function(typing_context, a):
                return returns(*kinds), codegen
        else:

            @intrinsic
            def function(typing_context, a, b):
                return returns(*kinds), codegen

        return function

    def _load(letter, kind):
        def load(builder, address, count):
            registers = ",".join(f"${i}" for i in range(count))
            text = f"ld.{kind}.v{count}.f32 {{{registers}}}, [${count}];"
            constraints = f"{'=f,' * count}{letter},~{{memory}}"
            out = asm(builder, ir.LiteralStructType([F32] * count), [address], text, constraints)
            return [builder.extract_value(out, i) for i in range(count)]

        return load

    # Load 2 or 4 contiguous float32. `load_fresh_floats` bypasses the L1 cache, for numbers that other blocks have just
    # written.
    load_fresh_floats, load_shared_floats = _load("l", "global.cg"), _load("r", "shared")

    def _store(letter, space, kind):
        def store(builder, address, values):
            registers = ", ".join(f"${i}" for i in range(1, len(values) + 1))
            text = f"st.{space}.v{len(values)}.b32 [$0], {{{registers}}};"
            constraints = ",".join([letter, *kind * len(values), "~{memory}"])
            asm(builder, VOID, [address, *values], text, constraints)

        return store

    # Store 2 or 4 contiguous numbers of 32 bits.
    store_floats, store_words = _store("l", "global", "f"), _store("l", "global", "r")
    store_shared_floats = _store("r", "shared", "f")

    def _counter(order):
        text = f"atom.{order}.gpu.global.add.s32 $0, [$1], $2;"
        return _function(types.int32, (types.uint64, types.int32), text, "=r,l,r,~{memory}", True)

    # Add to an int32 in global memory; return the old value. acq_rel: a thread that sees the new value also sees what
    # this thread wrote before, and what its block wrote before a barrier that precedes the addition. relaxed: no
    # ordering.
    atomic_add_acq_rel, atomic_increment = _counter("acq_rel"), _counter("relaxed")
    store_int = _statement("st.global.s32 [$0], $1;", types.uint64, types.int32)

    @intrinsic
    def divide(typing_context, a, b):
        """a // b of non-negative int32; Numba's own division is a 64-bit one of a hundred instructions."""

        def codegen(context, builder, signature, args):
            return builder.udiv(*args)

        return types.int32(types.int32, types.int32), codegen

    def page_row(builder, pages, shift, row):
        """Return the slot of a sequence's row, int32: page number times `1 << shift`, plus the offset in the page.

        `pages` is the global address of the sequence's page numbers; a page has `1 << shift` rows.
        """
        page = builder.lshr(row, shift)
        at = builder.add(pages, builder.shl(builder.zext(page, I64), ir.Constant(I64, 2)))
        number = asm(builder, I32, [at], "ld.global.nc.b32 $0, [$1];", "=r,l", False)
        return builder.add(builder.shl(builder.sub(number, page), shift), row)

    @intrinsic
    def page_row_of(typing_context, pages, shift, row):
        """`page_row` as an intrinsic for kernels."""

        def codegen(context, builder, signature, args):
            return page_row(builder, *args)

        return types.int32(types.uint64, types.int32, types.int32), codegen

    # Load a number from an address. Numba's array arguments cost 10 us each per launch, addresses almost nothing.
    load_int, load_long = _loads(types.int32, "r", 4), _loads(types.int64, "l", 8)

    def _conversion(source, target):
        """An intrinsic that writes 16 bytes: numbers of dtype `source` times a float32, rounded to nearest in dtype `target`."""
        count = 4 if target == "float32" else 8

        def emit(builder, into, at, scale):
            values = [builder.fmul(value, scale) for value in _load_floats(builder, at, source, count)]
            if target == "float32":
                words = [builder.bitcast(value, I32) for value in values]
            else:
                words = [pack(builder, target, *values[i : i + 2]) for i in range(0, 8, 2)]
            asm(builder, VOID, [into, *words], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r,~{memory}")

        @intrinsic
        def convert(typing_context, into, at, scale):
            def codegen(context, builder, signature, args):
                emit(builder, *args)
                return context.get_dummy_value()

            return types.void(types.uint64, types.uint64, types.float32), codegen

        return convert

    def _load_floats(builder, address, dtype, count):
        """Load `count` contiguous numbers as float32."""
        words = count if dtype == "float32" else count // 2
        loaded = []
        for first in range(0, words, 4):
            size = min(4, words - first)
            regs = ",".join(f"${i}" for i in range(size))
            chunk_address = builder.add(address, ir.Constant(I64, 4 * first))
            text = f"ld.global.nc.L1::no_allocate.v{size}.b32 {{{regs}}}, [${size}];"
            out = asm(
                builder,
                ir.LiteralStructType([I32] * size),
                [chunk_address],
                text,
                ",".join(["=r"] * size + ["l"]),
                False,
            )
            loaded += [builder.extract_value(out, i) for i in range(size)]
        if dtype == "float32":
            return [builder.bitcast(word, F32) for word in loaded]
        values = []
        for word in loaded:
            if dtype == "bfloat16":
                low = builder.shl(word, ir.Constant(I32, 16))
                high = builder.and_(word, ir.Constant(I32, -65536))
                values += [builder.bitcast(low, F32), builder.bitcast(high, F32)]
            else:
                text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
                out = asm(builder, ir.LiteralStructType([F32] * 2), [word], text, "=f,=f,r", False)
                values += [builder.extract_value(out, i) for i in range(2)]
        return values

    FLOATS = ("float32", "float16", "bfloat16")
    convert_16_bytes = {(source, target): _conversion(source, target) for source in FLOATS for target in FLOATS}

    @intrinsic
    def fill_16_bytes(typing_context, target):
        """Set all bits of 16 bytes, which is NaN in every float dtype."""

        def codegen(context, builder, signature, args):
            ones = ir.Constant(I32, -1)
            asm(builder, VOID, [*args, ones], "st.global.v4.b32 [$0], {$1, $1, $1, $1};", "l,r,~{memory}")
            return context.get_dummy_value()

        return types.void(types.uint64), codegen
