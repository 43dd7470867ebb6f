"""Inline PTX of Hopper alone (sm_90a): wgmma, mbarriers, named barriers, TMA and its tensor maps, registers moved between roles.

The rest of the intrinsics is in `ptx`. Sources: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions" (descriptors,
"Strides" of the canonical layouts) and "mbarrier".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from .ptx import F32, I32, I64, SHORT, VOID, _function, _statement, asm, types

SWIZZLE_128 = 1 << 62  # descriptor bits 62 and 63: 16-byte pieces of a 128-byte row lie at piece ^ (row % 8)

barrier_init = _statement("mbarrier.init.shared::cta.b64 [$0], $1;", types.uint32, types.uint32)
# Seen by the other warps and by the asynchronous units.
barriers_ready = _statement("fence.mbarrier_init.release.cluster;")
barrier_arrive = _statement("mbarrier.arrive.shared::cta.b64 _, [$0];", types.uint32)
# An arrival, after which the phase also waits for so many bytes that copies bring.
barrier_expect = _statement("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", types.uint32, types.uint32)
# An arrival as soon as all copies that this thread has started are done; nobody waits here.
barrier_arrive_after_copies = _statement("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", types.uint32)
barrier_wait = _statement(
    "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT_${:uid}; }",
    types.uint32,
    types.uint32,
)
# What this thread knows to be written (cp.async included) becomes visible to wgmma and TMA, which go another way.
fence_for_wgmma = _statement("fence.proxy.async.shared::cta;")

set_map_address = _statement(
    "tensormap.replace.tile.global_address.global.b1024.b64 [$0], $1;", types.uint64, types.uint64
)
set_map_rows = _statement("tensormap.replace.tile.global_dim.global.b1024.b32 [$0], 2, $1;", types.uint64, types.int32)
maps_written = _statement("fence.proxy.tensormap::generic.release.gpu;")
accept_map = _statement("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", types.uint64)


@intrinsic
def bring_box(typing_context, target, map, channel, head, row, barrier):
    """The copying unit brings a box from there on; its bytes count at the barrier."""
    text = "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [$0], [$1, {$2, $3, $4}], [$5];"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        asm(builder, VOID, args, text, "r,l,r,r,r,r,~{memory}")
        return context.get_dummy_value()

    address, number = types.uint32, types.int32
    return types.void(address, types.uint64, number, number, number, address), codegen


meet = _statement("bar.sync $0, $1;", types.int32, types.int32)  # named barrier, threads that it waits for
signal = _statement("bar.arrive $0, $1;", types.int32, types.int32)


def registers(change: str, count: int) -> Any:
    """setmaxnreg: a warpgroup takes ("inc") or leaves ("dec") registers; `count` is what it then has a thread."""
    return _statement(f"setmaxnreg.{change}.sync.aligned.u32 {count};")


uniform = _function(types.int32, (types.int32,), "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", True)


def descriptor(builder: Any, address: Any, leading: int, stride: int) -> Any:
    """A matrix in shared memory with rows of 128 swizzled bytes; `leading` and `stride` in bytes.

    The address loses its last four bits; `leading` counts between blocks of 64 columns where those are not contiguous in k,
    `stride` between groups of eight rows.
    """
    low = builder.zext(builder.lshr(address, ir.Constant(I32, 4)), I64)
    return builder.or_(low, ir.Constant(I64, SWIZZLE_128 | (leading >> 4) << 16 | (stride >> 4) << 32))


def multiply(
    builder: Any, dtype: str, columns: int, a: list[Any], b: Any, sums: list[Any] | None, steps: list[tuple[int, int]]
) -> list[Any]:
    """Start `sums + a b` (or `a b` where sums is None) of 64 rows and `columns`, 16 of k a step; returns sums in flight.

    Args:
        a: one descriptor, or the registers of A, four a step.
        b: descriptor. With A in registers b's columns are contiguous ("transposed"), else its k.
        steps: what is added to the descriptors of a (unused with registers) and b at each step, in units of 16 bytes.

    The sums must not be touched before `wait` returned them. One block of PTX: the compiler must not come between.
    """
    short, count, in_registers = SHORT[dtype], columns // 2, len(a) > 1
    results = ",".join(f"${i}" for i in range(count))
    first_a = count
    place_b = first_a + len(a)
    lines = ["{ .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for number, (step_a, step_b) in enumerate(steps):
        left = f"{{{','.join(f'${first_a + 4 * number + i}' for i in range(4))}}}" if in_registers else "a"
        if not in_registers:
            lines.append(f"add.s64 a, ${first_a}, {step_a};")
        keep = "0" if sums is None and number == 0 else "1"
        flags = f"{keep}, 1, 1, 1" if in_registers else f"{keep}, 1, 1, 0, 0"
        lines.append(f"add.s64 b, ${place_b}, {step_b};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{short}.{short} {{{results}}}, {left}, b, {flags};"
        )
    lines.append("wgmma.commit_group.sync.aligned; }")
    tied = [] if sums is None else sums
    constraints = ",".join(
        ["=&f"] * count
        + (["r"] * len(a) if in_registers else ["l"])
        + ["l"]
        + [str(i) for i in range(len(tied))]
        + ["~{memory}"]
    )
    kind = ir.LiteralStructType([F32] * count)
    out = asm(builder, kind, [*a, b, *tied], "\n\t".join(lines), constraints)
    return [builder.extract_value(out, i) for i in range(count)]


def wait(builder: Any, pending: int, sums: list[Any], alive: list[Any]) -> list[Any]:
    """Wait until at most `pending` started groups are unfinished; returns the sums, readable from here on.

    `alive`: registers that an unfinished group still reads (A); they must not be used for anything else before.
    """
    count = len(sums)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(alive) + ["~{memory}"])
    kind = ir.LiteralStructType([F32] * count)
    out = asm(builder, kind, [*sums, *alive], f"wgmma.wait_group.sync.aligned {pending};", constraints)
    return [builder.extract_value(out, i) for i in range(count)]
