"""`attn_implementation="range_kernels"` for Transformers models: two integers per query replace the dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention import attention

NAME = "range_kernels"
_SAMPLED_KEYS = 32
"""Random keys per query at which an interval is compared with its mask function, if the mask is too large to check in full."""
_FULL_CHECK = 1 << 20  # largest batch x queries x keys whose mask is checked in full
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "attention_bias", "head_mask", "alibi")
"""Keywords of Transformers' attention calls that change the result and are not supported."""

MaskFunction = Callable[..., Any]


def register_with_transformers(name: str = NAME) -> None:
    """Register attention and mask functions with Transformers, process-wide, for `attn_implementation=name`.

    Each query's interval of keys is found by bisection of the model's mask function. A mask that is not one interval
    per query is rejected with a ValueError when the model runs (every entry is checked if batch x queries x keys is at
    most 2 ** 20, else 32 random keys per query). Inference only: softmax attention with optional softcap, without sinks
    or biases.

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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls in every layer.

    Args:
        query, key, value: `[batch, heads, queries, head_dim]`, and `[batch, kv_heads, keys, head_dim]` for keys and
            values.
        attention_mask: from `interval_mask`, int32 `[batch, 1, queries, 2]`. None: causal, or every key if `is_causal`
            (by default the module's own) is False.

    Returns:
        the output `[batch, queries, heads, head_dim]`, and None in place of attention weights.

    Raises:
        ValueError: dropout, gradients, sinks or biases are needed, values and keys differ in width, or the mask was not
            made by `interval_mask`.
    """
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(
            f"range_kernels does not compute {unsupported[0]}, which this model's attention uses: use 'eager' or 'sdpa'"
        )
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"values are {value.shape[-1]} wide and keys {key.shape[-1]}: range_kernels needs them to be equal; use 'sdpa'"
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: range_kernels does not support dropout; call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("range_kernels has no backward pass: run under torch.no_grad(), or train with 'sdpa'")
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    key_start = key_stop = window = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.int32 or attention_mask.shape != (batch, 1, queries, 2):
            raise ValueError(
                f"the mask is {attention_mask.dtype} {tuple(attention_mask.shape)}, not int32 ({batch}, 1, {queries}, 2): it was made for "
                "another attention implementation; set attn_implementation='range_kernels' for the whole model"
            )
        key_start, key_stop = (attention_mask[..., end].reshape(-1) for end in (0, 1))
    elif is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        key_start = torch.zeros(batch * queries, dtype=torch.int32, device=query.device)
        key_stop = torch.full_like(key_start, keys)
    else:
        window = sliding_window
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (query, key, value))
    out = attention(
        q,
        k,
        v,
        list(range(0, batch * queries + 1, queries)),
        list(range(0, batch * keys + 1, keys)),
        key_start=key_start,
        key_stop=key_stop,
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
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function that Transformers calls once per forward pass; arguments as in `transformers.masking_utils`.

    Returns:
        `key_start` and `key_stop` of each query, int32 `[batch, 1, queries, 2]`, counted from `kv_offset`; None for a
        plain causal mask. (It has four axes because a model passes a 4-D mask on to its inner model unchanged.) A query
        that does not see its own key, such as padding, gets an empty interval.

    Raises:
        ValueError: the keys that a query sees are not one interval that contains its own key.
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
    key_start = sees.last_seen(own, torch.full_like(own, kv_offset))
    key_stop = sees.last_seen(own, torch.full_like(own, kv_offset + kv_length - 1))
    sees_nothing = ~sees(own)
    key_start, key_stop = (
        torch.where(sees_nothing, kv_offset, key_start),
        torch.where(sees_nothing, kv_offset, key_stop + 1),
    )
    sees.check(key_start, key_stop, ~sees_nothing)
    return torch.stack([key_start - kv_offset, key_stop - kv_offset], dim=-1).to(torch.int32)[:, None]


class _Visibility:
    """A mask function evaluated at one key per query: `sees(keys)` for `keys` int64 `[batch, queries]`."""

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
        """Return, per query, the last seen key between `inside` and `end`, by bisection: it assumes an interval."""
        seen_key, unseen_key = inside.clone(), torch.where(end >= inside, end + 1, end - 1)
        while bool(((unseen_key - seen_key).abs() > 1).any()):
            middle = torch.div(seen_key + unseen_key, 2, rounding_mode="floor")
            unfinished = (unseen_key - seen_key).abs() > 1
            seen = self(torch.where(unfinished, middle, seen_key))
            seen_key, unseen_key = (
                torch.where(unfinished & seen, middle, seen_key),
                torch.where(unfinished & ~seen, middle, unseen_key),
            )
        return seen_key

    def check(self, key_start: torch.Tensor, key_stop: torch.Tensor, rows: torch.Tensor) -> None:
        """Raise ValueError if the mask of a query in `rows` (bool) differs from its interval at a checked key."""
        generator = torch.Generator().manual_seed(0)
        whole = key_start.numel() * self.keys <= _FULL_CHECK
        for number in range(self.keys if whole else _SAMPLED_KEYS):
            if whole:
                keys = torch.full_like(key_start, number + self.first)
            else:
                keys = torch.randint(self.keys, key_start.shape, generator=generator).to(key_start.device) + self.first
            wrong = rows & (self(keys) != ((key_start <= keys) & (keys < key_stop)))
            if bool(wrong.any()):
                batch, query = (int(at[0]) for at in wrong.nonzero(as_tuple=True))
                raise ValueError(
                    f"the keys that query {query} of sequence {batch} sees are not one interval (key {int(keys[batch, query])} breaks "
                    "it): range_kernels cannot express this mask; use attn_implementation='sdpa'"
                )
