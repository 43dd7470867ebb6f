"""Findings about where ranges lie: over placeholders, over text, over control tokens, and what spans ask of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ..errors import ModelError
from ..findings import Finding
from ..models import Model, placeholder_id
from ..prompt import Prompt
from ..ranges import Range, clip
from ..vision.families import picture_attention

_TOLD = 4  # positions or words that a message lists


def placeholder_findings(prompt: Prompt, model: Model) -> Iterator[Finding]:
    """Ranges against the model's placeholder tokens, where it has such a token; against control tokens anywhere."""
    ids = np.asarray(prompt.input_ids)
    inside = np.zeros(len(ids), dtype=bool)
    for start, stop in prompt.embedding_ranges:
        inside[max(start, 0) : max(stop, 0)] = True
    if not inside.any():
        return
    placeholder = placeholder_id(model.config)
    if placeholder is not None and (ids == placeholder).any():
        yield from _against_placeholders(prompt, model, ids, inside, placeholder)
    elif placeholder is not None:
        yield Finding(
            "placeholder-missing",
            "info",
            f"no token under a range is the model's placeholder {_named(model, placeholder)}; engines that look for it "
            "(Transformers' own forward does) will not find these items",
        )
    control = np.isin(ids, list(_control_ids(model))) & inside
    if control.any():
        at = control.nonzero()[0]
        yield Finding(
            "range-over-control",
            "warning",
            f"{len(at)} control token{'s' * (len(at) > 1)} under ranges ({_listed(model, ids, at)}): the model no longer sees them; move the range, "
            "unless that is what you want",
            _item_at(prompt, int(at[0])),
        )


def _against_placeholders(
    prompt: Prompt, model: Model, ids: np.ndarray, inside: np.ndarray, placeholder: int
) -> Iterator[Finding]:
    covered, bare = inside & (ids != placeholder), ~inside & (ids == placeholder)
    homes = _homes(ids == placeholder, [stop - start for start, stop in prompt.embedding_ranges])
    moved = [home[0] - start for home, (start, _) in zip(homes, prompt.embedding_ranges, strict=False)]
    if covered.any():
        at = covered.nonzero()[0]
        mend = "move the ranges over the placeholders"
        if moved and len(set(moved)) == 1:
            mend = f"move every range by {moved[0]:+d}, and each lies over its placeholders exactly"
        elif moved:
            mend = f"their placeholders stand at {', '.join(f'[{a}, {b})' for a, b in homes[:_TOLD])}"
        yield Finding(
            "range-over-text",
            "warning",
            f"{_tokens(len(at))} that should be read {'lies' if len(at) == 1 else 'lie'} under ranges and {'is' if len(at) == 1 else 'are'} "
            f"lost ({_listed(model, ids, at)}): {mend}",
            _item_at(prompt, int(at[0])),
        )
    if bare.any():
        at = bare.nonzero()[0]
        yield Finding(
            "placeholder-bare",
            "warning",
            f"{len(at)} of {int((ids == placeholder).sum())} placeholders {_named(model, placeholder)} lie outside every range (first at "
            f"position {at[0]}): the model reads them as tokens. {int(inside.sum())} rows stand in ranges; are a row or an item "
            "missing, or is a range too short?",
        )


def span_findings(prompt: Prompt, model: Model | None, max_prefill_token_num: int | None) -> Iterator[Finding]:
    """What pictures need besides rows: positions on three axes, attention both ways, a chunk that holds a span whole."""
    if model is not None and prompt.embedding_ranges:
        config = model.text_config
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("mrope_section") and (prompt.position_ids is None or prompt.position_ids.ndim != 2):
            yield Finding(
                "positions-missing",
                "warning",
                f"{config.model_type} turns by time, height and width (M-RoPE), and position_ids is "
                f"{'missing' if prompt.position_ids is None else 'one number a token'}: pictures would stand in a line. Give [3, seq]; "
                "build_prompt makes them",
            )
        if picture_attention(model.config) == "bidirectional" and not prompt.bidirectional:
            yield Finding(
                "attention-causal",
                "warning",
                f"{model.config.model_type} lets the tokens of a picture see each other both ways, and no span says so: give "
                "Span(attention='bidirectional'); build_prompt does",
            )
    if max_prefill_token_num is not None:
        for number, (start, stop) in enumerate(prompt.bidirectional):
            first = start // max_prefill_token_num
            if first != (stop - 1) // max_prefill_token_num:
                at = (first + 1) * max_prefill_token_num
                yield Finding(
                    "span-cut",
                    "warning",
                    f"the tokens of [{start}, {stop}) see each other both ways, and a prefill in chunks of {max_prefill_token_num} "
                    f"cuts them at {at}: rows before it cannot see rows after it. Raise max_prefill_token_num to {stop} or more, or "
                    "use an engine that never cuts a span",
                    number,
                )


@lru_cache(maxsize=8)
def _control_ids(model: Model) -> frozenset[int]:
    """Ids that steer a chat (begin, end, turns), without the placeholders of pictures and sounds."""
    try:
        special = set(model.tokenizer.all_special_ids)
    except ModelError:  # a model without a tokenizer has no words to protect
        return frozenset()
    config = model.config
    names = (name for name in config.to_dict() if name.endswith(("_token_id", "_token_index")))
    media = {getattr(config, name, None) for name in names if name.startswith(("image", "video", "audio", "vision"))}
    return frozenset(special - media)


def _item_at(prompt: Prompt, position: int) -> int | None:
    return next((item for item, _ in clip(prompt.embedding_ranges, position, position + 1)), None)


def _homes(placeholders: np.ndarray, lengths: Sequence[int]) -> list[Range]:
    """Where each range would cover placeholders exactly, taken in order; empty where they cannot be shared out so."""
    places = placeholders.nonzero()[0]
    if len(places) != sum(lengths):
        return []
    homes, at = [], 0
    for length in lengths:
        first, last = int(places[at]), int(places[at + length - 1])
        if length < 1 or last - first != length - 1:
            return []
        homes.append((first, last + 1))
        at += length
    return homes


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _named(model: Model, token: int) -> str:
    try:
        return f"{model.tokens([token])[0]!r} ({token})"
    except ModelError:
        return str(token)


def _listed(model: Model, ids: np.ndarray, at: Sequence[int] | np.ndarray) -> str:
    shown = [f"{_named(model, int(ids[position]))} at {position}" for position in at[:_TOLD]]
    return ", ".join([*shown, "..."] if len(at) > _TOLD else shown)
