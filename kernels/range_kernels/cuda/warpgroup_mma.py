"""The operations of a consumer warpgroup on Hopper: asynchronous wgmma products that overlap with the softmax of another
warpgroup or of the warpgroup's own previous tile.

`warp_mma` contains the operations on values in registers. Tile shapes are defined here, since wgmma descriptors depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba.cuda.extending import intrinsic

from . import ptx, ptx_sm90
from .cp_async import LINE
from .ptx import types
from .warp_mma import apply_softcap, load, online_softmax_step, rescale_rows, save, statement


def warpgroups_of(head_dim: int) -> int:
    """Number of consumer warpgroups, 64 queries each: three if their accumulators fit in registers, else two."""
    return 3 if head_dim == 64 else 2


def rows_of(head_dim: int) -> int:
    """Queries per work tile."""
    return 64 * warpgroups_of(head_dim)


def padded(head_dim: int) -> int:
    """`head_dim` rounded up to a multiple of 64, the width of the swizzle: the channels of a row in shared memory."""
    return -(-head_dim // 64) * 64


def keys_of(head_dim: int) -> int:
    """Keys per tile: as many as fit in shared memory with two stages of keys and of values."""
    return 64 if head_dim == 256 else 128


@dataclass(frozen=True)
class WarpgroupOperations:
    """Intrinsics for a warpgroup's 64 rows; see `warpgroup_operations`."""

    start_qk_product: Callable[..., Any]
    wait_all_qk_products: Callable[..., Any]
    wait_qk_product: Callable[..., Any]
    softmax_step: Callable[..., Any]
    start_pv_product: Callable[..., Any]
    wait_pv_product: Callable[..., Any]
    rescale: Callable[..., Any]
    pack: Callable[..., Any]


@cache
def warpgroup_operations(head_dim: int, dtype: str, softcap: bool) -> WarpgroupOperations:
    """Return the operations for a head size and dtype.

    Registers are laid out as in `warp_mma`: for each warp's 16 rows, `s` is `[keys / 8, 4]` and `o` `[head_dim / 8, 4]`, both
    float32, and `p`, the weights in the dtype, `[keys / 16, 4]` pairs.
    """
    keys, rows = keys_of(head_dim), rows_of(head_dim)
    s_count, o_count, p_count = keys // 2, head_dim // 2, keys // 4
    # Channels come in blocks of 64, each a matrix with rows of 128 bytes: 16 channels further is 32 bytes further or the next block.
    q_steps = [(step // 4 * rows * LINE + step % 4 * 32) >> 4 for step in range(head_dim // 16)]
    k_steps = [(step // 4 * keys * LINE + step % 4 * 32) >> 4 for step in range(head_dim // 16)]
    v_steps = [(step * 16 * LINE) >> 4 for step in range(keys // 16)]

    def emit_start_qk_product(builder: Any, s: Any, q_address: Any, k_address: Any) -> None:
        queries, columns = (ptx_sm90.descriptor(builder, each, 16, 8 * LINE) for each in (q_address, k_address))
        steps = list(zip(q_steps, k_steps, strict=True))
        save(builder, s, ptx_sm90.multiply(builder, dtype, keys, [queries], columns, None, steps))

    def emit_wait_qk_product(builder: Any, s: Any, inner: Any, outer: Any, pending: int) -> None:
        scores = ptx_sm90.wait(builder, pending, load(builder, s, s_count), [])
        save(builder, s, [apply_softcap(builder, score, inner, outer) for score in scores] if softcap else scores)

    def emit_softmax_step(builder: Any, s: Any, factors: Any, row_max: Any, row_sum: Any, factor: Any) -> None:
        scores, maxima, totals = load(builder, s, s_count), load(builder, row_max, 2), load(builder, row_sum, 2)
        save(builder, factors, online_softmax_step(builder, scores, maxima, totals, factor))
        for pointer, values in ((s, scores), (row_max, maxima), (row_sum, totals)):
            save(builder, pointer, values)

    def emit_start_pv_product(builder: Any, o: Any, p: Any, v_address: Any) -> None:
        values = ptx_sm90.descriptor(builder, v_address, keys * LINE, 8 * LINE)
        sums, weights = load(builder, o, o_count), load(builder, p, p_count)
        steps = [(0, step) for step in v_steps]
        save(builder, o, ptx_sm90.multiply(builder, dtype, head_dim, weights, values, sums, steps))

    def emit_wait_pv_product(builder: Any, o: Any, p: Any) -> None:
        save(builder, o, ptx_sm90.wait(builder, 0, load(builder, o, o_count), load(builder, p, p_count)))

    def emit_rescale(builder: Any, o: Any, factors: Any) -> None:
        sums = load(builder, o, o_count)
        rescale_rows(builder, sums, load(builder, factors, 2))
        save(builder, o, sums)

    def emit_pack(builder: Any, p: Any, s: Any) -> None:
        scores = load(builder, s, s_count)
        save(builder, p, [ptx.pack(builder, dtype, *scores[2 * i : 2 * i + 2]) for i in range(p_count)])

    @intrinsic
    def start_qk_product(typing_context, s, q_address, k_address):
        """Start s = q k^T for the warpgroup's 64 rows of q; s must not be read before a wait."""
        return types.void(s, types.uint32, types.uint32), statement(emit_start_qk_product)

    def waiting(pending: int) -> Any:
        @intrinsic
        def wait_qk_product(typing_context, s, inner, outer):
            """Wait for s and apply the softcap, if any; at most `pending` later products may still be in flight."""
            signature = types.void(s, types.float32, types.float32)
            return signature, statement(lambda builder, *args: emit_wait_qk_product(builder, *args, pending))

        return wait_qk_product

    @intrinsic
    def softmax_step(typing_context, s, factors, row_max, row_sum, factor):
        """Online softmax step: replace scores by weights 2 ** (factor (s - maximum)), set `factors` for `rescale`."""
        return types.void(s, factors, row_max, row_sum, types.float32), statement(emit_softmax_step)

    @intrinsic
    def start_pv_product(typing_context, o, p, v_address):
        """Start o += p v; before `wait_pv_product`, o must not be read nor p overwritten."""
        return types.void(o, p, types.uint32), statement(emit_start_pv_product)

    @intrinsic
    def wait_pv_product(typing_context, o, p):
        """Wait until o is complete; then p may be overwritten."""
        return types.void(o, p), statement(emit_wait_pv_product)

    @intrinsic
    def rescale(typing_context, o, factors):
        """Multiply each row of `o` in place by its factor, set by `softmax_step`; no product into `o` may be in flight."""
        return types.void(o, factors), statement(emit_rescale)

    @intrinsic
    def pack(typing_context, p, s):
        """p = the weights in the dtype, in the register layout of a wgmma operand."""
        return types.void(p, s), statement(emit_pack)

    return WarpgroupOperations(
        start_qk_product, waiting(0), waiting(1), softmax_step, start_pv_product, wait_pv_product, rescale, pack
    )
