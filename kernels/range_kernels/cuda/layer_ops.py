"""A decoder's operations between its matrix products, each in one launch: add and RMSNorm, gated activation, rotary embedding.

Every row is computed by threads of its own in one order, so its bits do not depend on the other rows. Numbers are computed in float32
and rounded where torch's separate operations round them, except that an activation is not rounded before it is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from numba import cuda, float32, int32, int64, uint64

from .compiled_kernel import Kernel, Source
from .ptx import load_long, types
from .vectors import (
    SIZES,
    gelu_tanh,
    inverse_root,
    load_eight,
    load_one,
    round_to,
    silu,
    store_eight,
    store_one,
    warp_sum,
)

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_NORM_THREADS, _GATE_THREADS, _ROTATE_WARPS = 512, 256, 4


@cache
def make_norm(dtype: str, weight_dtype: str, adds: bool) -> Callable[..., None]:
    """The kernel of `add_rms_norm` (`adds`) or `rms_norm`: one block per row, eight channels per thread and turn."""
    size, weight_size, turn = uint64(SIZES[dtype]), uint64(SIZES[weight_dtype]), uint64(8)
    load, store, load_weight, rounded = load_eight[dtype], store_eight[dtype], load_eight[weight_dtype], round_to[dtype]

    def norm(x, added, weight, total, out, chunks, epsilon):
        """`total` gets x + added, `out` its norm; rows have `8 * chunks` channels."""
        shared = cuda.shared.array(32, float32)
        row, thread = uint64(cuda.blockIdx.x) * uint64(chunks), int32(cuda.threadIdx.x)
        squares = float32(0.0)
        chunk = thread
        while chunk < chunks:
            at = (row + uint64(chunk)) * turn * size
            values = load(x + at)
            if adds:
                more = load(added + at)
                values = (
                    rounded(values[0] + more[0]), rounded(values[1] + more[1]), rounded(values[2] + more[2]),
                    rounded(values[3] + more[3]), rounded(values[4] + more[4]), rounded(values[5] + more[5]),
                    rounded(values[6] + more[6]), rounded(values[7] + more[7]),
                )  # fmt: skip
                store(total + at, values)
            for number in range(8):
                squares += values[number] * values[number]
            chunk += int32(cuda.blockDim.x)
        squares = warp_sum(squares)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(cuda.blockDim.x >> 5)
        if lane == 0:
            shared[warp] = squares
        cuda.syncthreads()
        squares = warp_sum(shared[lane] if lane < warps else float32(0.0))
        factor = inverse_root(squares / float32(int32(8) * chunks) + epsilon)
        source = total if adds else x
        chunk = thread
        while chunk < chunks:
            at = (row + uint64(chunk)) * turn * size
            values, scales = load(source + at), load_weight(weight + uint64(chunk) * turn * weight_size)
            store(
                out + at,
                (
                    values[0] * factor * scales[0], values[1] * factor * scales[1], values[2] * factor * scales[2],
                    values[3] * factor * scales[3], values[4] * factor * scales[4], values[5] * factor * scales[5],
                    values[6] * factor * scales[6], values[7] * factor * scales[7],
                ),
            )  # fmt: skip
            chunk += int32(cuda.blockDim.x)

    return norm


@cache
def make_gate(dtype: str, gelu: bool) -> Callable[..., None]:
    """The kernel of `gate`: eight channels per thread; `gelu` chooses the tanh-approximated GELU instead of SiLU."""
    size, turn = uint64(SIZES[dtype]), uint64(8)
    load, store = load_eight[dtype], store_eight[dtype]

    activation = gelu_tanh if gelu else silu

    def gate(both, out, chunks):
        """Rows of `both` are gate and up, each of `8 * chunks` channels."""
        chunk = int32(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x)
        if chunk < chunks:
            row = uint64(cuda.blockIdx.x)
            at = both + (row * uint64(2) * uint64(chunks) + uint64(chunk)) * turn * size
            a, b = load(at), load(at + uint64(chunks) * turn * size)
            store(
                out + (row * uint64(chunks) + uint64(chunk)) * turn * size,
                (
                    activation(a[0]) * b[0], activation(a[1]) * b[1], activation(a[2]) * b[2], activation(a[3]) * b[3],
                    activation(a[4]) * b[4], activation(a[5]) * b[5], activation(a[6]) * b[6], activation(a[7]) * b[7],
                ),
            )  # fmt: skip

    return gate


@cache
def make_rotate(dtype: str, weight_dtype: str, interleaved: bool, norms: bool) -> Callable[..., None]:
    """Return the kernel of `rotate_heads`: one warp per token and head. With `norms`, each head goes through an RMSNorm first.

    If it is called with a KV cache, rotated keys and unchanged values are also written there.
    """
    size, weight_size = uint64(SIZES[dtype]), uint64(SIZES[weight_dtype])
    load, store, load_weight, rounded = load_one[dtype], store_one[dtype], load_one[weight_dtype], round_to[dtype]

    def rotate(
        x, row_bytes, heads, queries, head_dim, cosine, sine, pairs, weights, epsilon, slots, key_cache, value_cache
    ):
        """The first `heads` heads of each row of `x` are rotated in place; `weights` are of the norms of queries, then of keys.

        With `slots`, heads from `queries` on are written to slot `slots[token]` of `key_cache` too, and as many heads after `heads` to
        `value_cache`.
        """
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        token, head = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y * _ROTATE_WARPS + warp)
        keys = int32(heads - queries)
        if head >= heads + (keys if slots != uint64(0) else int32(0)):
            return
        start = x + uint64(token) * uint64(row_bytes) + uint64(head) * uint64(head_dim) * size
        cache, slot = uint64(0), int64(0)
        if slots != uint64(0) and head >= queries:
            slot = load_long(slots + uint64(8) * uint64(token))
            row = uint64(slot) * uint64(keys) * uint64(head_dim) * size
            cache = key_cache + row + uint64(int32(head - queries)) * uint64(head_dim) * size
        if head >= heads:
            cache = value_cache + row + uint64(int32(head - heads)) * uint64(head_dim) * size
            channel = lane
            while channel < head_dim:
                store(cache + uint64(channel) * size, load(start + uint64(channel) * size))
                channel += int32(32)
            return
        angles = uint64(token) * uint64(pairs)
        factor, scales = float32(1.0), weights
        if norms:
            if head >= queries:
                scales = weights + uint64(head_dim) * weight_size
            squares = float32(0.0)
            channel = lane
            while channel < head_dim:
                value = load(start + uint64(channel) * size)
                squares += value * value
                channel += int32(32)
            factor = inverse_root(warp_sum(squares) / float32(head_dim) + epsilon)
        pair = lane
        while pair < pairs:
            if interleaved:
                one, other = uint64(2) * uint64(pair), uint64(2) * uint64(pair) + uint64(1)
            else:
                one, other = uint64(pair), uint64(pair) + uint64(pairs)
            a, b = load(start + one * size), load(start + other * size)
            if norms:
                a = rounded(a * factor * load_weight(scales + one * weight_size))
                b = rounded(b * factor * load_weight(scales + other * weight_size))
            c, s = (
                load_one_float(cosine + (angles + uint64(pair)) * uint64(4)),
                load_one_float(sine + (angles + uint64(pair)) * uint64(4)),
            )
            first, second = a * c - b * s, b * c + a * s
            store(start + one * size, first)
            store(start + other * size, second)
            if cache != uint64(0):
                store(cache + one * size, first)
                store(cache + other * size, second)
            pair += int32(32)
        channel = int32(int32(2) * pairs + lane)
        while channel < head_dim:
            at = uint64(channel)
            value = load(start + at * size)
            if norms:
                value = value * factor * load_weight(scales + at * weight_size)
                store(start + at * size, value)
            if cache != uint64(0):
                store(cache + at * size, value)
            channel += int32(32)

    return rotate


load_one_float = load_one["float32"]
_A, _I, _F = types.uint64, types.int32, types.float32


def norm_source(dtype: str, weight_dtype: str, adds: bool) -> Source:
    """The `Source` of `make_norm`'s kernel."""
    kinds = types.void(_A, _A, _A, _A, _A, _I, _F)
    name = f"rms norm {dtype} {weight_dtype} adds={adds}"
    return Source(name, partial(make_norm, dtype, weight_dtype, adds), kinds, _NORM_THREADS)


def gate_source(dtype: str, gelu: bool) -> Source:
    """The `Source` of `make_gate`'s kernel."""
    return Source(f"gate {dtype} gelu={gelu}", partial(make_gate, dtype, gelu), types.void(_A, _A, _I), _GATE_THREADS)


def rotate_source(dtype: str, weight_dtype: str, interleaved: bool, norms: bool) -> Source:
    """The `Source` of `make_rotate`'s kernel."""
    kinds = types.void(_A, types.int64, _I, _I, _I, _A, _A, _I, _A, _F, _A, _A, _A)
    make = partial(make_rotate, dtype, weight_dtype, interleaved, norms)
    name = f"rotate {dtype} {weight_dtype} interleaved={interleaved} norms={norms}"
    return Source(name, make, kinds, 32 * _ROTATE_WARPS)


@cache
def _norm(dtype: str, weight_dtype: str, adds: bool, device: int) -> Kernel:
    return Kernel(norm_source(dtype, weight_dtype, adds), device)


@cache
def _gate(dtype: str, gelu: bool, device: int) -> Kernel:
    return Kernel(gate_source(dtype, gelu), device)


@cache
def _rotate(dtype: str, weight_dtype: str, interleaved: bool, norms: bool, device: int) -> Kernel:
    return Kernel(rotate_source(dtype, weight_dtype, interleaved, norms), device)


def wide(*tensors: torch.Tensor) -> bool:
    """Whether rows of the last dimension can be read eight numbers at a time: contiguous, aligned to 16 bytes, a multiple of eight long."""
    return all(
        each.is_contiguous() and not each.data_ptr() % 16 and not each.shape[-1] % 8 and each.dtype in DTYPES
        for each in tensors
    )


def launch_norm(
    x: torch.Tensor,
    added: torch.Tensor | None,
    weight: torch.Tensor,
    total: torch.Tensor | None,
    out: torch.Tensor,
    epsilon: float,
) -> None:
    """`total` = x + added and `out` = its RMSNorm, or `out` = the norm of `x`; all `[rows, width]` and `wide`."""
    chunks = x.shape[-1] // 8
    kernel = _norm(DTYPES[x.dtype], DTYPES[weight.dtype], added is not None, x.device.index or 0)
    threads = min(_NORM_THREADS, -(-chunks // 32) * 32)
    others = (0, 0) if added is None or total is None else (added.data_ptr(), total.data_ptr())
    kernel.launch(
        (x.numel() // x.shape[-1], 1), x, x.data_ptr(), others[0], weight.data_ptr(), others[1], out.data_ptr(), chunks, epsilon,
        threads=threads,
    )  # fmt: skip


def launch_gate(both: torch.Tensor, out: torch.Tensor, gelu: bool) -> None:
    """`out` `[rows, n]` = activation of the first half of `both` `[rows, 2 n]` times the second; both `wide`."""
    chunks = out.shape[1] // 8
    grid = (len(both), -(-chunks // _GATE_THREADS))
    _gate(DTYPES[both.dtype], gelu, both.device.index or 0).launch(grid, both, both.data_ptr(), out.data_ptr(), chunks)


def launch_rotate(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    interleaved: bool,
    norms: torch.Tensor | None,
    queries: int,
    epsilon: float,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Rotate the heads of `x` `[tokens, heads, head_dim]` in place; the last two dimensions are contiguous.

    Args:
        cache: keys and values of the KV cache, `[slots, kv_heads, head_dim]` each, and int64 `[tokens]`, the slots that the keys, and the
            values that follow the heads in memory, are written to.
    """
    weight = x if norms is None else norms
    kernel = _rotate(DTYPES[x.dtype], DTYPES[weight.dtype], interleaved, norms is not None, x.device.index or 0)
    warps = x.shape[1] + (0 if cache is None else x.shape[1] - queries)
    written = (0, 0, 0) if cache is None else (cache[2].data_ptr(), cache[0].data_ptr(), cache[1].data_ptr())
    kernel.launch(
        (len(x), -(-warps // _ROTATE_WARPS)), x, x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1], queries, x.shape[2],
        cosine.data_ptr(), sine.data_ptr(), cosine.shape[1], weight.data_ptr(), epsilon, *written,
    )  # fmt: skip
