"""Build a `Prompt` from chat messages with images: ids with placeholders, feature rows, ranges, spans, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ModelError, PromptError
from ..models import Model
from ..prompt import MultimodalPrompt, Prompt, Span
from .architectures import Family, Features, family_of, is_known
from .class_prompt import process_items
from .images import ImageLike
from .messages import Message, unpack_messages
from .processors import Processor
from .tower import VisionTower, load_vision_tower


def build_prompt(
    model: Model,
    messages: str | Sequence[Message],
    images: Sequence[ImageLike | Any] = (),
    *,
    tower: VisionTower | None = None,
    features: Sequence[Features] | None = None,
    text: str | None = None,
) -> Prompt:
    """Build the prompt that an engine with `input_embeddings` needs to answer about images (or sounds).

    Args:
        model: from `load_model`.
        messages: chat messages in Transformers' format, whose content may include `{"type": "image", "image": image}`
            (a PIL image or a path; `"audio"` with a waveform or a WAV file, `"video"` with a file or a `Video`, likewise). Or a
            string: one user turn of all `images`, followed by this text.
        images: the images (videos, sounds) for parts without one, in order, and for a string.
        tower: an open tower; if both `tower` and `features` are missing, it is loaded from the model.
        features: features of all images in order, computed before; then no tower is needed. Only for the families of
            `architectures.py`: others' layouts depend on the images.
        text: the text of the whole prompt, with special tokens and a marker for each image, to use instead of the chat
            template.

    Returns:
        a Prompt; each range has a span that names its image and patch grid.

    Raises:
        PromptError, ImageError: more or fewer images than markers, or an image cannot be used.
        ModelError: the architecture's layout of images is not known.
    """
    if not is_known(model.config) or _has_videos(messages):
        return _class_prompt(model, messages, images, tower, features, text)
    if features is None:
        tower = tower or load_vision_tower(model)
    elif images and len(images) != len(features):
        raise PromptError(f"{len(images)} images but {len(features)} features: give one per image, in the same order")
    processor = tower.processor if tower is not None else Processor(model.path, model.config, model.trust_remote_code)
    assert isinstance(processor, Processor)
    family = family_of(model.config, processor.tokenizer)
    # Features take the place of their images if no images are given.
    turns, items = _unpack(messages, list(images) or list(features or ()), family)
    if features is None:
        assert tower is not None
        features = tower.features(items)
    return _lay_out(family, processor, features, processor.text(turns) if text is None else text)


def _has_videos(messages: str | Sequence[Message]) -> bool:
    """Whether a message has a video, of which only the model's combined processor knows the layout."""
    if isinstance(messages, str):
        return False
    contents = [message["content"] for message in messages if isinstance(message, dict) and "content" in message]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return any(isinstance(part, dict) and part.get("type") == "video" for part in parts)


def _unpack(messages: str | Sequence[Message], given: list[Any], family: Family) -> tuple[list[Message], list[Any]]:
    turns, items = unpack_messages(messages, given, {family.modality: family.marker}, family.config.model_type)
    return turns, [item.content for item in items]


def _class_prompt(
    model: Model,
    messages: str | Sequence[Message],
    given: Sequence[Any],
    tower: VisionTower | None,
    features: Sequence[Features] | None,
    text: str | None,
) -> Prompt:
    if features is not None:
        raise ModelError(
            f"features alone do not say how {model.config.model_type!r} lays out its items: give the images, videos or sounds, or build the "
            "Prompt yourself"
        )
    tower = tower or load_vision_tower(model)
    processor = tower.own_processor
    turns, items = unpack_messages(messages, list(given), processor.markers, model.config.model_type)
    return tower.prompt(process_items(processor, processor.text(turns) if text is None else text, items), items)


def _lay_out(family: Family, processor: Processor, features: Sequence[Features], marked: str) -> Prompt:
    """Turn a text with markers into a Prompt: replace the markers by placeholders, tokenize, and find the ranges."""
    whole = family.arrange(_replace(marked, family, features))
    ids = processor.tokenizer.encode(whole, add_special_tokens=False)
    return _find_ranges(ids, family, features, processor.tokenizer.convert_tokens_to_ids(family.token))


def build_multimodal(
    model: Model,
    messages: str | Sequence[Message],
    images: Sequence[ImageLike | Any] = (),
    *,
    tower: VisionTower | None = None,
) -> MultimodalPrompt:
    """Build the same prompt for an engine that runs the vision model itself: placeholders and processed images, no features.

    Args:
        model, messages, images: as in `build_prompt`.
        tower: an open tower, for its processor; loaded if it is None. Its network runs only if the numbers of rows do
            not follow from the processor's output.

    Raises:
        PromptError, ImageError, ModelError: as in `build_prompt`.
    """
    tower = tower or load_vision_tower(model)
    if not is_known(model.config) or _has_videos(messages):
        return _class_multimodal(model, messages, images, tower)
    assert isinstance(tower.processor, Processor)
    family = family_of(model.config, tower.processor.tokenizer)
    turns, items = _unpack(messages, list(images), family)
    processed = tower.process(items) if items else {}
    outline = family.outline(processed, len(items)) if items else []
    outline = tower.features(items) if outline is None else outline
    laid_out = _lay_out(family, tower.processor, outline, tower.processor.text(turns))
    prompt = Prompt(laid_out.input_ids, position_ids=laid_out.position_ids)
    if not items:
        return MultimodalPrompt.of(prompt, ())
    is_placeholder = torch.tensor([prompt.input_ids]) == tower.processor.tokenizer.convert_tokens_to_ids(family.token)
    return MultimodalPrompt.of(prompt, [{**processed, **family.token_types(is_placeholder.int())}])


_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets")


def _class_multimodal(
    model: Model, messages: str | Sequence[Message], given: Sequence[Any], tower: VisionTower
) -> MultimodalPrompt:
    processor = tower.own_processor
    turns, items = unpack_messages(messages, list(given), processor.markers, model.config.model_type)
    processed = process_items(processor, processor.text(turns), items)
    laid_out = tower.prompt(processed, items)
    prompt = Prompt(laid_out.input_ids, position_ids=laid_out.position_ids)
    inputs = {name: value for name, value in processed.items() if name not in _OF_TEXT}
    return MultimodalPrompt.of(prompt, [inputs] if items else ())


def _replace(text: str, family: Family, features: Sequence[Features]) -> str:
    """Replace each item's marker by its placeholders."""
    texts = text.split(family.marker)
    if len(texts) - 1 != len(features):
        raise PromptError(
            f"the prompt has {len(texts) - 1} markers ({family.marker}) for {len(features)} {family.modality}s: the chat "
            "template and the messages disagree, or the text contains the marker itself"
        )
    filled = [texts[0]]
    for item, following in zip(features, texts[1:], strict=True):
        filled += [family.text(item), following]
    return "".join(filled)


def _find_ranges(ids: list[int], family: Family, features: Sequence[Features], token: int) -> Prompt:
    """Find the placeholders and return the Prompt with a range for each span of each item."""
    runs: list[tuple[int, Span]] = []
    rows, levels = [], []
    for number, item in enumerate(features):
        own = family.spans(item, f"{family.modality} {number}")
        runs += own
        sizes = [size for size, _ in own]
        rows += list(item.rows.split(sizes))
        levels += [] if item.deepstack is None else list(item.deepstack.split(sizes, dim=1))
    positions = [position for position, each in enumerate(ids) if each == token]
    if len(positions) != sum(size for size, _ in runs):
        raise PromptError(
            f"the prompt has {len(positions)} placeholders for {sum(size for size, _ in runs)} rows of features"
        )
    ranges, at = [], 0
    for number, (size, span) in enumerate(runs):
        start, stop = positions[at], positions[at + size - 1] + 1
        if stop - start != size:
            raise PromptError(
                f"the placeholders of {span.label or number} are not contiguous: [{start}, {stop}) for {size} rows"
            )
        ranges.append((start, stop))
        at += size
    spans = family.whole_prompt([span for _, span in runs], len(ids))
    return Prompt(ids, rows, ranges, spans, family.position_ids(len(ids), ranges, spans), levels)
