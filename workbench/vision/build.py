"""From chat messages with pictures to a Prompt: ids with placeholders, items, ranges, spans, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PromptError
from ..models import Model
from ..prompt import MultimodalPrompt, Prompt, Span
from .families import Family, Features, family_of
from .images import Picture
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
        text: a prompt whose markers stand for the pictures already, for models without a chat template.

    Returns:
        a Prompt; each range has a span that names its picture and patch grid.

    Raises:
        PromptError, ImageError: more pictures than places or fewer, or a picture that cannot be used.
    """
    turns, items = _unpack(messages, list(images))
    if features is None:
        tower = tower or load_vision_tower(model)
        features = tower.features(items)
    elif items and len(items) != len(features):
        raise PromptError(f"{len(items)} pictures but {len(features)} features: give one an item, in the same order")
    processor = tower.processor if tower is not None else _processor(model)
    family = family_of(model.config, processor.tokenizer)
    return _lay_out(family, processor, features, turns, text)


def _lay_out(
    family: Family, processor: Any, features: Sequence[Features], turns: list[Message], text: str | None
) -> Prompt:
    """Text with placeholders, ids, ranges."""
    if text is None and any(
        part["type"] == "text" and family.marker in str(part["text"]) for turn in turns for part in turn["content"]
    ):
        raise PromptError(
            f"a text of the messages holds {family.marker!r}, which marks the places of pictures: leave it out, or put the "
            "picture there as a part of its own"
        )
    marked = text if text is not None else processor.text(turns)
    whole = family.arrange(_replace(marked, family, features))
    ids = processor.tokenizer.encode(whole, add_special_tokens=text is not None and not whole.startswith(family.token))
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
    turns, items = _unpack(messages, list(images))
    tower = tower or load_vision_tower(model)
    processed = tower.process(items) if items else {}
    family = family_of(model.config, tower.processor.tokenizer)
    outline = family.outline(processed, len(items)) if items else []
    laid_out = _lay_out(family, tower.processor, tower.features(items) if outline is None else outline, turns, None)
    prompt = Prompt(laid_out.input_ids, position_ids=laid_out.position_ids)
    return MultimodalPrompt.of(prompt, [processed] if processed else ())


def _unpack(messages: str | Sequence[Message], images: list[Any]) -> tuple[list[Message], list[Any]]:
    """Messages whose content lists texts and bare places, and the items in the order of their places."""
    if isinstance(messages, str):
        places = [{"type": "image"} for _ in images]
        return [{"role": "user", "content": [*places, {"type": "text", "text": messages}]}], images
    turns: list[Message] = []
    items, waiting = [], list(images)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"messages[{number}] is {message!r}: give a dict with role and content")
        content = message["content"]
        if isinstance(content, str):
            turns.append({"role": message["role"], "content": [{"type": "text", "text": content}]})
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind not in ("image", "audio"):
                raise PromptError(
                    f"messages[{number}] holds a part of type {kind!r}: only text, image and audio are known"
                )
            given = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
            if given is None:
                if not waiting:
                    raise PromptError(f"messages have more places for pictures than there are pictures ({len(images)})")
                given = waiting.pop(0)
            items.append(given)
            parts.append({"type": kind, f"{kind}_url": "", "audio_url": ""} if kind == "audio" else {"type": kind})
        turns.append({"role": message["role"], "content": parts})
    if waiting:
        raise PromptError(
            f"{len(waiting)} of {len(images)} pictures have no place in the messages: add {{'type': 'image'}} parts"
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


def _processor(model: Model) -> Any:
    from .processors import load_processor

    return load_processor(model.path, model.config, model.trust_remote_code)
