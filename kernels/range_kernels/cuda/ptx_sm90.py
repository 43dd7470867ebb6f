"""Inline PTX for Hopper only (sm_90a): wgmma, mbarriers, named barriers, TMA and its tensor maps, setmaxnreg.

The other intrinsics are in `ptx`. Sources: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions" (descriptors,
"Strides" of the canonical layouts) and "mbarrier".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda.extending import intrinsic

from .ptx import F32, I32, I64, SHORT, VOID, _function, _statement, asm, types

SWIZZLE_128 = 1 << 62  # descriptor bits 62 and 63: 16-byte chunk c of a 128-byte row is at chunk c ^ (row % 8)

barrier_init = _statement("mbarrier.init.shared::cta.b64 [$0], $1;", types.uint32, types.uint32)
# Makes the initialised mbarriers visible to the other warps and to the async proxy.
barrier_init_fence = _statement("fence.mbarrier_init.release.cluster;")
barrier_arrive = _statement("mbarrier.arrive.shared::cta.b64 _, [$0];", types.uint32)
# Arrives, and makes the phase also wait for the given number of bytes from TMA.
barrier_expect = _statement("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", types.uint32, types.uint32)
# Arrives once all cp.async copies of this thread are complete; the thread itself does not wait.
barrier_arrive_after_copies = _statement("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", types.uint32)
barrier_wait = _statement(
    "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT_${:uid}; }",
    types.uint32,
    types.uint32,
)
# Makes writes that are visible to this thread (cp.async included) visible to wgmma and TMA, which use the async proxy.
fence_async_proxy = _statement("fence.proxy.async.shared::cta;")

# A tensor map is changed in global memory (address of the tensor; dimension 2 is its number of rows). `map_release`
# publishes the changes of this thread; `map_acquire` makes those of one map, at the given address, visible to TMA.
set_map_address = _statement(
    "tensormap.replace.tile.global_address.global.b1024.b64 [$0], $1;", types.uint64, types.uint64
)
set_map_rows = _statement("tensormap.replace.tile.global_dim.global.b1024.b32 [$0], 2, $1;", types.uint64, types.int32)
map_release = _statement("fence.proxy.tensormap::generic.release.gpu;")
map_acquire = _statement("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", types.uint64)


@intrinsic
def tma_load_3d(typing_context, target, map, channel, head, row, barrier):
    """Start the TMA load of the box at (channel, head, row) to shared memory at `target`; one thread calls it per box.

    `map` is the global address of the tensor map. The loaded bytes count towards the transaction of the mbarrier
    `barrier`.
    """
    text = "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [$0], [$1, {$2, $3, $4}], [$5];"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        asm(builder, VOID, args, text, "r,l,r,r,r,r,~{memory}")
        return context.get_dummy_value()

    address, number = types.uint32, types.int32
    return types.void(address, types.uint64, number, number, number, address), codegen


# Operands: number of the named barrier, number of threads that it waits for.
named_barrier_sync = _statement("bar.sync $0, $1;", types.int32, types.int32)
named_barrier_arrive = _statement("bar.arrive $0, $1;", types.int32, types.int32)


def registers(change: str, count: int) -> Any:
    """Return setmaxnreg: a warpgroup claims ("inc") or releases ("dec") registers and then has `count` per thread."""
    return _statement(f"setmaxnreg.{change}.sync.aligned.u32 {count};")


# Return lane 0's int32 in all lanes, so that the compiler can keep it in a uniform register; all lanes of the warp must
# call it.
uniform = _function(types.int32, (types.int32,), "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", True)


def descriptor(builder: Any, address: Any, leading: int, stride: int) -> Any:
    """Return the wgmma descriptor (64 bits) of a matrix in shared memory with rows of 128 swizzled bytes.

    The address is stored without its last four bits. `leading`: bytes between blocks of 64 columns, if these are not
    contiguous in k. `stride`: bytes between groups of eight rows.
    """
    low = builder.zext(builder.lshr(address, ir.Constant(I32, 4)), I64)
    return builder.or_(low, ir.Constant(I64, SWIZZLE_128 | (leading >> 4) << 16 | (stride >> 4) << 32))


def multiply(
    builder: Any, dtype: str, columns: int, a: list[Any], b: Any, sums: list[Any] | None, steps: list[tuple[int, int]]
) -> list[Any]:
    """Start the wgmma product `sums + a b` (`a b` if `sums` is None), 64 rows x `columns`, with 16 of k per step.

    Returns the registers of the sums, which are in flight: they must not be used before `wait` has returned them.
    The whole is one block of PTX, so that the compiler cannot insert code between the steps.

    Args:
        a: one descriptor, or the registers of A, four per step.
        b: descriptor. With A in registers, B is contiguous along its columns ("transposed"), else along k.
        steps: offsets added to the descriptors of a (unused with registers) and b at each step, in units of 16 bytes.
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
    """Wait until at most `pending` wgmma groups are unfinished; return `sums`, which can then be read.

    `alive`: registers (operand A) that the product reads while it runs; the compiler must not reuse them before this
    wait.
    """
    count = len(sums)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(alive) + ["~{memory}"])
    kind = ir.LiteralStructType([F32] * count)
    out = asm(builder, kind, [*sums, *alive], f"wgmma.wait_group.sync.aligned {pending};", constraints)
    return [builder.extract_value(out, i) for i in range(count)]
