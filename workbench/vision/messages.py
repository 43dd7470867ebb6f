"""Chat messages with images, videos and sounds: which items they contain, in which order, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PromptError

Message = dict[str, Any]


class Item(NamedTuple):
    """One image, video or sound; `modality` is "image", "video" or "audio"."""

    modality: str
    content: Any


def unpack_messages(
    messages: str | Sequence[Message], given: list[Any], markers: Mapping[str, str], model_type: str
) -> tuple[list[Message], list[Item]]:
    """Return messages with only texts and empty item parts as content, and the items in the order of their parts.

    Args:
        messages: in Transformers' format; a string is one user turn of all `given` items, followed by this text.
        given: the items of parts without content, in order.
        markers: by modality that the model takes, the text that stands for an item. The first is that of a string's items.

    Raises:
        PromptError: parts of other kinds, more or fewer items than parts, or a text that contains a marker.
    """
    first = next(iter(markers))
    if isinstance(messages, str):
        content = [*({"type": first} for _ in given), {"type": "text", "text": messages}]
        messages = [{"role": "user", "content": content}]
    turns: list[Message] = []
    items: list[Item] = []
    waiting = list(given)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"messages[{number}] is {message!r}: give a dict with role and content")
        content = message["content"]
        if not isinstance(content, str | Sequence):
            raise PromptError(f"messages[{number}] has the content {content!r:.80}: give a text or a list of parts")
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                for modality, marker in markers.items():
                    if marker in part["text"]:
                        raise PromptError(
                            f"messages[{number}] contains {marker!r} in a text, which marks the positions of {_plural(modality)}: leave "
                            f"it out, or add the {_one(modality)} as a separate part"
                        )
                parts.append({"type": "text", "text": part["text"]})
            elif isinstance(kind, str) and kind in markers:
                content_of = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
                if content_of is None and not waiting:
                    raise PromptError(f"messages mark more {_plural(kind)} than were given ({len(given)})")
                items.append(Item(kind, waiting.pop(0) if content_of is None else content_of))
                # Qwen2-Audio's template looks for the key, not the type
                parts.append({"type": kind, "audio_url": ""} if kind == "audio" else {"type": kind})
            else:
                taken = " and ".join(repr(each) for each in markers)
                raise PromptError(
                    f"messages[{number}] contains {part!r:.80}: {model_type} takes parts of type 'text' (with a text) and {taken}"
                )
        turns.append({"role": message["role"], "content": parts})
    if waiting:
        raise PromptError(
            f"{len(waiting)} of {len(given)} {_plural(first)} have no part in the messages: add {{'type': {first!r}}} parts"
        )
    return turns, items


def _plural(modality: str) -> str:
    return "sounds" if modality == "audio" else f"{modality}s"


def _one(modality: str) -> str:
    return "sound" if modality == "audio" else modality
