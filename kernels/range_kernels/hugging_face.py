"""`attn_implementation="range_kernels"` for Transformers' models: no dense mask, two ints a token instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention import attention

NAME = "range_kernels"
_CHECKED = 32
"""Keys a query at which an interval is held against the mask it was made from, where there are too many to look at all."""
_ALL = 1 << 20
_CHANGES = ("s_aux", "sinks", "position_bias", "attention_bias", "head_mask", "alibi")
"""Keywords of Transformers' attention calls that change what is computed."""

MaskFunction = Callable[..., Any]


def register_with_transformers(name: str = NAME) -> None:
    """Register attention and mask functions, so that any decoder runs with `attn_implementation=name`.

    Masks are asked for their intervals by bisection, and a mask that is none is refused (looked at whole where batch x queries x
    keys is up to a million, else at 32 keys a query). Inference only; softmax attention with optional softcap, no sinks, no biases.

    >>> register_with_transformers()
    >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="range_kernels")  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, interval_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention call: `query` `[batch, heads, queries, head_dim]` -> `[batch, queries, heads, head_dim]`.

    Args:
        attention_mask: from `interval_mask`, int32 `[batch, 1, queries, 2]`; None is causal.

    Raises:
        ValueError: dropout, gradients, sinks or biases, values of another width than keys, or a mask of another kind.
    """
    changes = [name for name in _CHANGES if more.get(name) is not None]
    if changes:
        raise ValueError(
            f"range_kernels does not compute {changes[0]}, which this model's attention has: use 'eager' or 'sdpa'"
        )
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"values are {value.shape[-1]} wide and keys {key.shape[-1]}: range_kernels takes one head size; use 'sdpa'"
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: range_kernels has none, call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("range_kernels has no backward pass: run under torch.no_grad(), or train with 'sdpa'")
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    low = reach = window = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.int32 or attention_mask.shape != (batch, 1, queries, 2):
            raise ValueError(
                f"the mask is {attention_mask.dtype} {tuple(attention_mask.shape)}, not int32 ({batch}, 1, {queries}, 2): it was made for "
                "another attention implementation; set attn_implementation='range_kernels' for the whole model"
            )
        low, reach = (attention_mask[..., end].reshape(-1) for end in (0, 1))
    elif is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        low = torch.zeros(batch * queries, dtype=torch.int32, device=query.device)
        reach = torch.full_like(low, keys - 1)
    else:
        window = sliding_window
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (query, key, value))
    out = attention(
        q,
        k,
        v,
        list(range(0, batch * queries + 1, queries)),
        list(range(0, batch * keys + 1, keys)),
        low=low,
        reach=reach,
        window=window,
        softcap=softcap or 0.0,
        scale=scaling,
    )
    return out.view(batch, queries, heads, head_dim), None


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> torch.Tensor | None:
    """Transformers' mask call: for every query the first and the last key it sees, int32 `[batch, 1, queries, 2]`, or None for causal.

    Four axes, because a model hands such a mask on to the model inside it as it is.

    Keys count from the first one that is there. A query that does not see its own key (padding) sees none.

    Raises:
        ValueError: the keys that a query sees are no interval around its own.
    """
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        padding_mask_function,
        prepare_padding_mask,
    )

    mask_function = mask_function or causal_mask_function
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not bool(padding.all()):
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    elif (
        allow_is_causal_skip and mask_function is causal_mask_function and kv_offset + kv_length == q_offset + q_length
    ):
        return None
    sees = _Visibility(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, device)
    own = sees.own
    low = sees.last_seen(own, torch.full_like(own, kv_offset))
    reach = sees.last_seen(own, torch.full_like(own, kv_offset + kv_length - 1))
    blind = ~sees(own)
    low, reach = torch.where(blind, kv_offset + 1, low), torch.where(blind, kv_offset, reach)
    sees.check(low, reach, ~blind)
    return torch.stack([low - kv_offset, reach - kv_offset], dim=-1).to(torch.int32)[:, None]


class _Visibility:
    """A mask function asked for one key a query at a time: `sees(keys)` for `keys` int64 `[batch, queries]`."""

    def __init__(
        self, function: MaskFunction, batch: int, queries: int, keys: int, q_offset: int, kv_offset: int, device: Any
    ) -> None:
        self.function, self.first, self.keys = function, kv_offset, keys
        self.batches = torch.arange(batch, device=device)[:, None].expand(batch, queries)
        self.queries = (torch.arange(queries, device=device) + q_offset)[None].expand(batch, queries)
        self.heads = torch.zeros_like(self.batches)
        self.own = self.queries.clamp(kv_offset, kv_offset + keys - 1)

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        seen = self.function(self.batches, self.heads, self.queries, keys)
        return torch.as_tensor(seen, device=keys.device).expand(keys.shape)

    def last_seen(self, inside: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """The key furthest from `inside` towards `end` that is still seen, by bisection."""
        good, bad = inside.clone(), torch.where(end >= inside, end + 1, end - 1)
        while bool(((bad - good).abs() > 1).any()):
            middle = torch.div(good + bad, 2, rounding_mode="floor")
            open_ = (bad - good).abs() > 1
            seen = self(torch.where(open_, middle, good))
            good, bad = torch.where(open_ & seen, middle, good), torch.where(open_ & ~seen, middle, bad)
        return good

    def check(self, low: torch.Tensor, reach: torch.Tensor, rows: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        whole = low.numel() * self.keys <= _ALL
        for number in range(self.keys if whole else _CHECKED):
            if whole:
                keys = torch.full_like(low, number + self.first)
            else:
                keys = torch.randint(self.keys, low.shape, generator=generator).to(low.device) + self.first
            wrong = rows & (self(keys) != ((low <= keys) & (keys <= reach)))
            if bool(wrong.any()):
                batch, query = (int(at[0]) for at in wrong.nonzero(as_tuple=True))
                raise ValueError(
                    f"query {query} of sequence {batch} sees no interval of keys (key {int(keys[batch, query])} does not fit): "
                    "range_kernels cannot express this mask; use attn_implementation='sdpa'"
                )
