"""What a warpgroup of Hopper does to its part of an attention tile: its products are under way while another
warpgroup, or its own tile before, is at the softmax.

`tile` holds what a warp does to numbers that are there. Shapes of tiles stand here, too: descriptors of products depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba.cuda.extending import intrinsic

from . import ptx, ptx_hopper
from .fetch import LINE
from .ptx import types
from .tile import cap, load, save, shrink_sums, soften, statement


def groups_of(head_dim: int) -> int:
    """Warpgroups that compute, 64 queries each: a third where their numbers are few enough to fit."""
    return 3 if head_dim == 64 else 2


def rows_of(head_dim: int) -> int:
    """Queries a work."""
    return 64 * groups_of(head_dim)


def keys_of(head_dim: int) -> int:
    """Keys a tile: as many as two tiles of keys and of values leave room for."""
    return 64 if head_dim == 256 else 128


@dataclass(frozen=True)
class WarpgroupOperations:
    """Intrinsics of a warpgroup's 64 rows; see `warpgroup_operations`."""

    start_scores: Callable[..., Any]
    wait_all_scores: Callable[..., Any]
    wait_scores: Callable[..., Any]
    weights: Callable[..., Any]
    start_values: Callable[..., Any]
    wait_values: Callable[..., Any]
    shrink: Callable[..., Any]
    pack: Callable[..., Any]


@cache
def warpgroup_operations(head_dim: int, dtype: str, softcap: bool) -> WarpgroupOperations:
    """A thread's numbers lie as in `tile`: of each warp's 16 rows, `s` is `[keys / 8, 4]`, `o` `[head_dim / 8, 4]`, both float32,
    and `p`, weights in the dtype, `[keys / 16, 4]` pairs.
    """
    keys, rows = keys_of(head_dim), rows_of(head_dim)
    s_count, o_count, p_count = keys // 2, head_dim // 2, keys // 4
    # Channels come in blocks of 64, a block a matrix of rows of 128 bytes: 16 channels on is 32 bytes on, or the next block.
    q_steps = [(step // 4 * rows * LINE + step % 4 * 32) >> 4 for step in range(head_dim // 16)]
    k_steps = [(step // 4 * keys * LINE + step % 4 * 32) >> 4 for step in range(head_dim // 16)]
    v_steps = [(step * 16 * LINE) >> 4 for step in range(keys // 16)]

    def emit_start_scores(builder: Any, s: Any, q_address: Any, k_address: Any) -> None:
        queries, columns = (ptx_hopper.descriptor(builder, each, 16, 8 * LINE) for each in (q_address, k_address))
        steps = list(zip(q_steps, k_steps, strict=True))
        save(builder, s, ptx_hopper.multiply(builder, dtype, keys, [queries], columns, None, steps))

    def emit_wait_scores(builder: Any, s: Any, inner: Any, outer: Any, pending: int) -> None:
        scores = ptx_hopper.wait(builder, pending, load(builder, s, s_count), [])
        save(builder, s, [cap(builder, score, inner, outer) for score in scores] if softcap else scores)

    def emit_weights(builder: Any, s: Any, shrinks: Any, largest: Any, total: Any, factor: Any) -> None:
        scores, tops, totals = load(builder, s, s_count), load(builder, largest, 2), load(builder, total, 2)
        save(builder, shrinks, soften(builder, scores, tops, totals, factor))
        for pointer, values in ((s, scores), (largest, tops), (total, totals)):
            save(builder, pointer, values)

    def emit_start_values(builder: Any, o: Any, p: Any, v_address: Any) -> None:
        values = ptx_hopper.descriptor(builder, v_address, keys * LINE, 8 * LINE)
        sums, weights = load(builder, o, o_count), load(builder, p, p_count)
        steps = [(0, step) for step in v_steps]
        save(builder, o, ptx_hopper.multiply(builder, dtype, head_dim, weights, values, sums, steps))

    def emit_wait_values(builder: Any, o: Any, p: Any) -> None:
        save(builder, o, ptx_hopper.wait(builder, 0, load(builder, o, o_count), load(builder, p, p_count)))

    def emit_shrink(builder: Any, o: Any, shrinks: Any) -> None:
        sums = load(builder, o, o_count)
        shrink_sums(builder, sums, load(builder, shrinks, 2))
        save(builder, o, sums)

    def emit_pack(builder: Any, p: Any, s: Any) -> None:
        scores = load(builder, s, s_count)
        save(builder, p, [ptx.pack(builder, dtype, *scores[2 * i : 2 * i + 2]) for i in range(p_count)])

    @intrinsic
    def start_scores(typing_context, s, q_address, k_address):
        """s = q k^T begins; the warpgroup's rows of q."""
        return types.void(s, types.uint32, types.uint32), statement(emit_start_scores)

    def waiting(pending: int) -> Any:
        @intrinsic
        def wait_scores(typing_context, s, inner, outer):
            """s is here, capped where the kernel caps, and at most `pending` products begun later are not."""
            signature = types.void(s, types.float32, types.float32)
            return signature, statement(lambda builder, *args: emit_wait_scores(builder, *args, pending))

        return wait_scores

    @intrinsic
    def weights(typing_context, s, shrinks, largest, total, factor):
        """Online softmax: scores to weights 2 ** (factor (s - maximum)); what sums must shrink by."""
        return types.void(s, shrinks, largest, total, types.float32), statement(emit_weights)

    @intrinsic
    def start_values(typing_context, o, p, v_address):
        """o += weights times values begins."""
        return types.void(o, p, types.uint32), statement(emit_start_values)

    @intrinsic
    def wait_values(typing_context, o, p):
        """o is here, and p may be overwritten."""
        return types.void(o, p), statement(emit_wait_values)

    @intrinsic
    def shrink(typing_context, o, shrinks):
        """Rows of o times their factor."""
        return types.void(o, shrinks), statement(emit_shrink)

    @intrinsic
    def pack(typing_context, p, s):
        """p = weights in the dtype, as wgmma takes them from registers."""
        return types.void(p, s), statement(emit_pack)

    return WarpgroupOperations(start_scores, waiting(0), waiting(1), weights, start_values, wait_values, shrink, pack)
