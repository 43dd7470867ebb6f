"""The recurrent part of linear attention: a short causal convolution and the gated delta rule (Yang et al. 2024, arXiv:2412.06464).

Both take packed sequences and keep the state of each sequence in a slot, so that a prompt can run in chunks and decode token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cpu import delta_net as kernels
from .cpu.kernel_cache import check_caches
from .cpu.launch import PARALLEL

check_caches(kernels)


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, or the next chunks of them.

    Attributes:
        cu_seqlens: int64 `[sequences + 1]`, cumulative numbers of tokens.
        slots: int64 `[sequences]`, where the state of each sequence is; different ones.
        fresh: bool `[sequences]`, whether a sequence begins here: its state is set to zero first.
    """

    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    fresh: torch.Tensor


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, sequences: Sequences, states: torch.Tensor
) -> torch.Tensor:
    """SiLU of a causal convolution of each channel: `out[t] = silu(sum_j weight[j] * x[t - K + 1 + j])`.

    Args:
        x: float32 `[tokens, channels]`, packed sequences.
        weight: float32 `[K, channels]`.
        states: float32 `[slots, K - 1, channels]`, the last inputs of each sequence; updated in place.

    Returns:
        float32 `[tokens, channels]`; on the CPU a token's bits do not depend on how its sequence was cut into chunks.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    kernel, channels = weight.shape
    _check("x", x, (len(x), channels), x)
    _check("weight", weight, (kernel, channels), x)
    _check("states", states, (len(states), kernel - 1, channels), x)
    out = torch.empty_like(x)
    args = (x, weight, *_sequences(sequences, len(x), len(states), x), states, out)
    if x.device.type == "cuda":
        from .cuda.delta_net import launch_convolution

        launch_convolution(*args)
        return out
    with PARALLEL:
        kernels.convolve(*(each.numpy() for each in args))
    return out


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    sequences: Sequences,
    states: torch.Tensor,
) -> torch.Tensor:
    """Each head keeps a matrix S and does for each token, with q and k divided by their lengths and q by `sqrt(key_dim)`:

        S = exp(decay) * S;    S = S + beta * k (v - S^T k)^T;    out = S^T q

    Args:
        q, k: float32 `[tokens, key_heads, key_dim]`; head h reads key head `h // (heads // key_heads)`.
        v: float32 `[tokens, heads, value_dim]`.
        decay, beta: float32 `[tokens, heads]`.
        states: float32 `[slots, heads, key_dim, value_dim]`; updated in place.

    Returns:
        float32 `[tokens, heads, value_dim]`; on the CPU a token's bits do not depend on how its sequence was cut into chunks.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tokens = len(q)
    heads, key_dim, value_dim = states.shape[1:]
    key_heads = q.shape[1]
    _check("q", q, (tokens, key_heads, key_dim), q)
    _check("k", k, (tokens, key_heads, key_dim), q)
    _check("v", v, (tokens, heads, value_dim), q)
    for name, each in (("decay", decay), ("beta", beta)):
        _check(name, each, (tokens, heads), q)
    _check("states", states, (len(states), heads, key_dim, value_dim), q)
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} heads do not divide into groups over {key_heads} key heads")
    out = torch.empty_like(v)
    args = (q, k, v, decay, beta, *_sequences(sequences, tokens, len(states), q), states, out)
    if q.device.type == "cuda":
        from .cuda.delta_net import launch_delta_rule

        launch_delta_rule(*args)
        return out
    with PARALLEL:
        kernels.delta_rule(*(each.numpy() for each in args))
    return out


def _check(name: str, given: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if given.shape != shape or given.dtype != torch.float32 or given.device != like.device or not given.is_contiguous():
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)} on {given.device}: expected contiguous float32 {shape} on {like.device}"
        )


def _sequences(sequences: Sequences, tokens: int, slots: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = (sequences.cu_seqlens, sequences.slots, sequences.fresh)
    lengths = [len(each) for each in parts]
    if lengths[0] != lengths[1] + 1 or lengths[1] != lengths[2] or any(each.device != like.device for each in parts):
        raise ValueError(
            f"cu_seqlens, slots and fresh have {lengths} entries: expected n + 1, n and n, on {like.device}"
        )
    if like.device.type == "cpu":
        cu, places = sequences.cu_seqlens, sequences.slots
        rises = bool((cu[1:] >= cu[:-1]).all()) and int(cu[0]) == 0 and int(cu[-1]) == tokens
        inside = bool(((places >= 0) & (places < slots)).all()) and len(set(places.tolist())) == len(places)
        if not rises or not inside:
            raise ValueError(
                f"cu_seqlens {cu.tolist()} must rise from 0 to {tokens}, and slots {places.tolist()} be different ones of {slots}"
            )
    return parts
