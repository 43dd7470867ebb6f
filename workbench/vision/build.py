"""From chat messages with pictures to a Prompt: ids with placeholders, items, ranges, spans, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import PromptError
from ..models import Model
from ..prompt import MultimodalPrompt, Prompt, Span
from .families import Family, Features, family_of
from .images import Picture
from .processors import Processor
from .tower import VisionTower, load_vision_tower

Message = dict[str, Any]


def build_prompt(
    model: Model,
    messages: str | Sequence[Message],
    images: Sequence[Picture | Any] = (),
    *,
    tower: VisionTower | None = None,
    features: Sequence[Features] | None = None,
    text: str | None = None,
) -> Prompt:
    """Build the prompt that an engine with `input_embeddings` needs to answer about pictures (or sounds).

    Args:
        model: from `load_model`.
        messages: chat messages in Transformers' form, whose content may hold `{"type": "image", "image": picture}` (a PIL image
            or a path; `"audio"` with a waveform likewise); or the text of one user turn, which `images` go before.
        images: the pictures, where messages only mark their places or are a plain text.
        tower: an open tower; loaded where it is missing and `features` are too.
        features: of all pictures in order, computed before; then no tower is needed.
        text: the whole prompt, special tokens included, whose markers stand for the pictures, in place of a chat template.

    Returns:
        a Prompt; each range has a span that names its picture and patch grid.

    Raises:
        PromptError, ImageError: more pictures than places or fewer, or a picture that cannot be used.
    """
    if features is None:
        tower = tower or load_vision_tower(model)
    elif images and len(images) != len(features):
        raise PromptError(f"{len(images)} pictures but {len(features)} features: give one an item, in the same order")
    processor = tower.processor if tower is not None else Processor(model.path, model.config, model.trust_remote_code)
    family = family_of(model.config, processor.tokenizer)
    # Features stand for their pictures where there are none.
    turns, items = _unpack(messages, list(images) or list(features or ()), family)
    if features is None:
        assert tower is not None
        features = tower.features(items)
    return _lay_out(family, processor, features, processor.text(turns) if text is None else text)


def _lay_out(family: Family, processor: Processor, features: Sequence[Features], marked: str) -> Prompt:
    """From a text with markers to placeholders, ids, ranges."""
    whole = family.arrange(_replace(marked, family, features))
    ids = processor.tokenizer.encode(whole, add_special_tokens=False)
    return _place(ids, family, features, processor.tokenizer.convert_tokens_to_ids(family.token))


def build_multimodal(
    model: Model,
    messages: str | Sequence[Message],
    images: Sequence[Picture | Any] = (),
    *,
    tower: VisionTower | None = None,
) -> MultimodalPrompt:
    """The same prompt for an engine with the vision model inside: placeholders and processed pictures, no features.

    Args:
        tower: an open one, for its processor; its network is not run.
    """
    tower = tower or load_vision_tower(model)
    family = family_of(model.config, tower.processor.tokenizer)
    turns, items = _unpack(messages, list(images), family)
    processed = tower.process(items) if items else {}
    outline = family.outline(processed, len(items)) if items else []
    outline = tower.features(items) if outline is None else outline
    laid_out = _lay_out(family, tower.processor, outline, tower.processor.text(turns))
    prompt = Prompt(laid_out.input_ids, position_ids=laid_out.position_ids)
    if not items:
        return MultimodalPrompt.of(prompt, ())
    places = torch.tensor([prompt.input_ids]) == tower.processor.tokenizer.convert_tokens_to_ids(family.token)
    return MultimodalPrompt.of(prompt, [{**processed, **family.token_types(places.int())}])


def _unpack(messages: str | Sequence[Message], images: list[Any], family: Family) -> tuple[list[Message], list[Any]]:
    """Messages whose content lists texts and bare places, and the items in the order of their places."""
    if isinstance(messages, str):
        content = [*({"type": family.modality} for _ in images), {"type": "text", "text": messages}]
        messages = [{"role": "user", "content": content}]
    turns: list[Message] = []
    items, waiting = [], list(images)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"messages[{number}] is {message!r}: give a dict with role and content")
        content = message["content"]
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                if family.marker in part["text"]:
                    raise PromptError(
                        f"messages[{number}] holds {family.marker!r} in a text, which marks the places of pictures: leave it "
                        "out, or put the picture there as a part of its own"
                    )
                parts.append({"type": "text", "text": part["text"]})
            elif kind == family.modality:
                given = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
                if given is None and not waiting:
                    raise PromptError(f"messages have more places for {kind}s than there are ({len(images)})")
                items.append(waiting.pop(0) if given is None else given)
                # Qwen2-Audio's template looks for the key, not the type
                parts.append({"type": kind, "audio_url": ""} if kind == "audio" else {"type": kind})
            else:
                raise PromptError(
                    f"messages[{number}] holds {part!r:.80}: {family.config.model_type} takes parts of type 'text' (with a "
                    f"text) and {family.modality!r}"
                )
        turns.append({"role": message["role"], "content": parts})
    if waiting:
        raise PromptError(
            f"{len(waiting)} of {len(images)} {family.modality}s have no place in the messages: add "
            f"{{'type': {family.modality!r}}} parts"
        )
    return turns, items


def _replace(text: str, family: Family, features: Sequence[Features]) -> str:
    """Put each item's placeholders where its marker stands."""
    pieces = text.split(family.marker)
    if len(pieces) - 1 != len(features):
        raise PromptError(
            f"the prompt has {len(pieces) - 1} places ({family.marker}) for {len(features)} {family.modality}s: the chat "
            "template and the messages do not agree, or the text holds the marker itself"
        )
    filled = [pieces[0]]
    for item, piece in zip(features, pieces[1:], strict=True):
        filled += [family.text(item), piece]
    return "".join(filled)


def _place(ids: list[int], family: Family, features: Sequence[Features], token: int) -> Prompt:
    """Find the placeholders and give each run of an item its range."""
    runs: list[tuple[int, Span]] = []
    rows, levels = [], []
    for number, item in enumerate(features):
        own = family.spans(item, f"{family.modality} {number}")
        runs += own
        sizes = [size for size, _ in own]
        rows += list(item.rows.split(sizes))
        levels += [] if item.deepstack is None else list(item.deepstack.split(sizes, dim=1))
    places = [position for position, each in enumerate(ids) if each == token]
    if len(places) != sum(size for size, _ in runs):
        raise PromptError(
            f"the prompt has {len(places)} placeholders for {sum(size for size, _ in runs)} rows of features"
        )
    ranges, at = [], 0
    for number, (size, span) in enumerate(runs):
        start, stop = places[at], places[at + size - 1] + 1
        if stop - start != size:
            raise PromptError(
                f"the placeholders of {span.label or number} are not in one piece: [{start}, {stop}) for {size} rows"
            )
        ranges.append((start, stop))
        at += size
    spans = family.whole_prompt([span for _, span in runs], len(ids))
    return Prompt(ids, rows, ranges, spans, family.position_ids(len(ids), ranges, spans), levels)
