"""`workbench.explore`: the whole bench from a model and what to ask it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .engines import open_engine
from .engines.api import Engine
from .errors import ModelError, PromptError
from .models import Model, load_model
from .prompt import Prompt
from .vision.images import open_image

if TYPE_CHECKING:
    from .widgets.explorer import Explorer

QUESTION = "What is in the picture?"
TEXT_QUESTION = "What is the capital of France?"


def explore(
    model: Model | str | os.PathLike,
    images_or_messages: Any = (),
    question: str | None = None,
    *,
    engine: Engine | str = "numba",
    dtype: str = "float32",
    target: str | None = None,
    judge: bool = True,
    new_tokens: int = 12,
) -> Explorer:
    """Open the bench: a prompt whose ranges can be dragged, its pictures, the map of hidden states, answers, the verdict.

    Last in a notebook cell it shows itself.

    Args:
        model: from `load_model`, or what that takes.
        images_or_messages: a picture (path or PIL image) or several; or chat messages in Transformers' form that hold pictures; or
            a `Prompt`; or nothing, for a prompt of text.
        question: asked about the pictures; without it "What is in the picture?". Not with messages or a Prompt.
        engine: whose states are shown, by name or open.
        dtype: for an engine by name.
        target: an engine whose rules lint adds, such as "turbomind==0.18.0".
        judge: compare with Transformers after each move.
        new_tokens: of each answer at most.

    Raises:
        PromptError, ImageError: a question beside messages, or pictures that cannot be used.
        ModelError: a model or an engine that cannot be opened; pictures for a model without vision.

    ```python
    workbench.explore("digit-cards", ["data/images/blue_7.png", "data/images/green_5.png"], "Which digits are on the cards?")
    ```
    """
    from .widgets.explorer import Explorer

    model = model if isinstance(model, Model) else load_model(model)
    given = [images_or_messages] if isinstance(images_or_messages, dict) else images_or_messages
    if question is not None and not isinstance(question, str):
        raise PromptError(f"question={question!r}: give a text")
    if isinstance(engine, Engine) and engine.model.digest != model.digest:
        raise ModelError(
            f"the engine runs {engine.model.name}, not {model.name}: open one with this model, or name a kind"
        )
    if question is not None and (isinstance(given, Prompt) or _is_messages(given)):
        raise PromptError(
            "question beside messages or a Prompt, which say already what is asked: leave one of them out"
        )
    prompt, pictures, ask = _prompt(model, given, question)
    opened = engine if isinstance(engine, Engine) else open_engine(engine, model, dtype=dtype)
    return Explorer(
        opened, prompt, pictures, question=question or (QUESTION if pictures else TEXT_QUESTION), ask=ask,
        target=target, judge=judge, new_tokens=new_tokens,
    )  # fmt: skip


def _prompt(model: Model, given: Any, question: str | None) -> tuple[Prompt, list[Any], Any]:
    """The first prompt, its pictures, and what builds one for another question (None where there is none to ask)."""
    from .vision import build_prompt, load_vision_tower

    if isinstance(given, Prompt):
        return given, [], None
    if _is_messages(given):
        for number, turn in enumerate(given):
            if not isinstance(turn.get("content"), str | list) or not isinstance(turn.get("role"), str):
                raise PromptError(f"messages[{number}] is {turn!r:.80}: give a dict with role and content")
        contents = [turn["content"] for turn in given]
        kinds = [
            part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)
        ]
        if all(part.get("type") == "text" for part in kinds):
            return Prompt(model.chat_ids(list(given))), [], None
        shown = [part.get("image") or part.get("path") for part in kinds if part.get("type") == "image"]
        return build_prompt(model, given), [None if image is None else open_image(image) for image in shown], None
    images = [given] if not isinstance(given, Sequence) or isinstance(given, str) else list(given)
    if not images:
        return (
            Prompt(model.chat_ids(question or TEXT_QUESTION)),
            [],
            lambda text: Prompt(model.chat_ids(text)),
        )
    pictures = [open_image(image) for image in images]
    tower = load_vision_tower(model)
    features = tower.features(pictures)

    def ask(text: str) -> Prompt:
        return build_prompt(model, text, pictures, tower=tower, features=features)

    return ask(question or QUESTION), pictures, ask


def _is_messages(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and bool(given)
        and not isinstance(given, str)
        and all(isinstance(turn, dict) for turn in given)
    )
