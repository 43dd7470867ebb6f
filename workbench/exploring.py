"""`workbench.explore`: open the explorer for a model and a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .engines.base import Engine
from .engines.function_engine import require_engine
from .engines.shared_engines import acquire_engine, release_engine
from .errors import ModelError, PromptError
from .models import Model, load_model
from .prompt import Prompt
from .vision.images import open_image

if TYPE_CHECKING:
    from .widgets.explorer import Explorer

QUESTION = "What is in the image?"
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
    inject: str = "as built",
    word: str = "",
    at: str | None = None,
    answer_start: str = "",
    fault: str = "none",
) -> Explorer:
    """Return an explorer: a widget with a prompt's draggable ranges, images, map of hidden states, answers and verdict.

    A notebook displays it if it is the last expression of a cell.

    Args:
        model: from `load_model`, or what `load_model` takes.
        images_or_messages: an image (path or PIL image) or several; or chat messages in Transformers' form that contain images; or
            a `Prompt`; or nothing, for a text-only prompt.
        question: the question about the images, by default "What is in the image?". Not allowed with messages or a Prompt.
        engine: the engine whose states are shown: a name or an open engine. Explorers of one model and dtype share an engine that is
            opened by its name; the last `Explorer.close` closes it. Running a notebook cell again closes the explorers of its last run.
        dtype: used if `engine` is a name.
        target: an engine whose rules lint also applies, such as "turbomind==0.18.0".
        judge: compare with Transformers after each change of the ranges.
        new_tokens: maximum number of tokens in an answer.
        inject: what the ranges contain: "as built" (the prompt's own items), "identity", "another word", "mix" or "noise".
        word: the word for "another word" and "mix", including its leading space.
        at: for a text-only prompt, the words that the first range covers; they must be part of the question.
        answer_start: for a text-only prompt, the text that the answer begins with.
        fault: a fault to inject, such as "range +1"; the menu lists all faults.

    Raises:
        PromptError, ImageError: a question is given in addition to messages, `at` is not in the prompt, or an image
            cannot be used.
        ModelError: the model or the engine cannot be opened, or the model has no vision part and images are given.

    ```python
    workbench.explore("digit-cards", ["data/images/blue_7.png", "data/images/green_5.png"], "Which digits are on the cards?")
    workbench.explore("smollm2-135m", inject="another word", word=" Japan", at=" France")
    ```
    """
    from .widgets.cells import close_views_of_earlier_runs, remember_view
    from .widgets.explorer import Explorer

    close_views_of_earlier_runs()
    model = model if isinstance(model, Model) else load_model(model)
    given = [images_or_messages] if isinstance(images_or_messages, dict) else images_or_messages
    if question is not None and not isinstance(question, str):
        raise PromptError(f"question={question!r}: give a string")
    if not isinstance(engine, str):
        require_engine(engine, "explore")
    if isinstance(engine, Engine) and engine.model.digest != model.digest:
        raise ModelError(
            f"the engine runs {engine.model.name}, not {model.name}: open one with this model, or give the engine's name"
        )
    if question is not None and (isinstance(given, Prompt) or _is_messages(given)):
        raise PromptError(
            "question is given in addition to messages or a Prompt, which contain it already: leave one out"
        )
    prompt, images, ask = _prompt(model, given, question, at, answer_start)
    opened = engine if isinstance(engine, Engine) else acquire_engine(engine, model, dtype)
    release = None if opened is engine else partial(release_engine, opened)
    try:
        explorer = Explorer(
            opened, prompt, images, question=question or (QUESTION if images else TEXT_QUESTION), ask=ask, target=target, judge=judge,
            new_tokens=new_tokens, inject=inject, word=word, fault=fault, answer_start=answer_start, on_close=release,
        )  # fmt: skip
    except BaseException:
        if release is not None:
            release()
        raise
    remember_view(explorer)
    return explorer


def _prompt(
    model: Model, given: Any, question: str | None, at: str | None, answer_start: str
) -> tuple[Prompt, list[Any], Callable[[str], Prompt] | None]:
    """Return the first prompt, its images, and a function that builds the prompt for another question (None without a question)."""
    from .vision import build_prompt, load_vision_tower

    if isinstance(given, Prompt):
        return given, [], None
    if _is_messages(given):
        for number, message in enumerate(given):
            if not isinstance(message.get("content"), str | list) or not isinstance(message.get("role"), str):
                raise PromptError(f"messages[{number}] is {message!r:.80}: give a dict with role and content")
        parts = [part for message in given for part in _parts(message)]
        if all(part.get("type") == "text" for part in parts):
            return Prompt(model.chat_ids(list(given))), [], None
        if any(part.get("type") == "video" for part in parts):
            own = [
                {**message, "content": [dict(part) for part in _parts(message)] or message["content"]}
                for message in given
            ]
            return _video_prompt(model, own, [part for message in own for part in _parts(message)])
        shown = [
            _content(part) if part.get("type") == "image" else None for part in parts if part.get("type") != "text"
        ]
        return build_prompt(model, given), [None if image is None else open_image(image) for image in shown], None
    images = [given] if not isinstance(given, Sequence) or isinstance(given, str) else list(given)
    if not images:

        def ask_text(text: str) -> Prompt:
            return _text_prompt(model, text, at, answer_start)

        return ask_text(question or TEXT_QUESTION), [], ask_text
    opened = [open_image(image) for image in images]
    tower = load_vision_tower(model)
    features = tower.features(opened)

    def ask(text: str) -> Prompt:
        return build_prompt(model, text, opened, tower=tower, features=features)

    return ask(question or QUESTION), opened, ask


def _text_prompt(model: Model, question: str, at: str | None, answer_start: str) -> Prompt:
    """Return a chat prompt with a range over the tokens of `at`, into which their own rows are injected."""
    ids = model.chat_ids(question)
    if answer_start:
        ids += model.tokenizer.encode(answer_start, add_special_tokens=False)
    if at is None:
        return Prompt(ids)
    tokens = model.tokenizer.encode(at, add_special_tokens=False)
    starts = [start for start in range(len(ids)) if tokens and ids[start : start + len(tokens)] == tokens]
    if not starts:
        raise PromptError(f"at={at!r} is not part of the prompt: give words of {question!r}, with their leading space")
    word_range = (starts[0], starts[0] + len(tokens))
    return Prompt(ids, [model.token_rows(tokens)], [word_range])


def _is_messages(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and bool(given)
        and not isinstance(given, str)
        and all(isinstance(message, dict) for message in given)
    )


def _video_prompt(
    model: Model, messages: Any, parts: Sequence[dict[str, Any]]
) -> tuple[Prompt, list[Any], Callable[[str], Prompt] | None]:
    """The prompt of messages with videos; each video is decoded once, for the prompt and for the view."""
    from .vision import build_prompt, load_vision_tower
    from .vision.videos import open_video

    tower = load_vision_tower(model)
    shown: list[Any] = []
    for part in parts:
        content, kind = _content(part), part.get("type")
        if kind == "video" and content is not None and "video" in tower.own_processor.markers:
            part["video"] = content = open_video(content, tower.own_processor.sampled_frames)
        if kind != "text":
            shown.append(
                open_image(content) if kind == "image" and content is not None else content if kind == "video" else None
            )
    return build_prompt(model, messages, tower=tower), shown, None


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _content(part: dict[str, Any]) -> Any:
    return next((part[key] for key in (part.get("type"), "path", "url") if key and part.get(key) is not None), None)
