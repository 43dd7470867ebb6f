"""Answers of an engine and of the reference to a prompt: generated step by step, cached, shown as HTML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape

from cachetools import LRUCache

from ..engines.base import Engine
from ..engines.types import GenerationConfig, ResponseType
from ..progress import Stopped
from ..prompt import Prompt

_MAX_ANSWERS = 200
_sessions = itertools.count(1 << 40)  # far from the ids that users choose
_Key = tuple[str, str, int]


class Answers:
    """Generates answers and keeps up to 200 of them, by engine name, prompt and length.

    If ranges have moved, the engine also answers the prompt as it was built, for comparison.

    Args:
        start: text at the end of the prompt, shown before every answer.
    """

    def __init__(self, start: str = "") -> None:
        self._start = start
        self._cached: LRUCache[_Key, str] = LRUCache(_MAX_ANSWERS)
        self._running: dict[_Key, str] = {}
        self._request: tuple[Engine, int] | None = None

    def cancel(self) -> None:
        """End the request that is being answered, if there is one; any thread may call it."""
        request = self._request
        if request is not None:
            request[0].cancel(request[1])

    def get(self, name: str, prompt: Prompt, new_tokens: int) -> str | None:
        """Return the complete answer of the engine `name` to a prompt, or None if it has not been generated."""
        return self._cached.get((name, prompt.digest, new_tokens))

    def stream(
        self, engines: dict[str, Engine], prompt: Prompt, home: Prompt, new_tokens: int
    ) -> Iterator[tuple[str, float]]:
        """Generate the answers that are not cached; yields (what is being done, fraction done) after each step.

        The iterator may be abandoned at any step, and raises Stopped after `cancel`; an unfinished answer is not cached.

        Args:
            engines: by name, the engine under test first.
            prompt: the prompt with its current ranges.
            home: the prompt as it was built, with its ranges not moved.
            new_tokens: maximum number of tokens in an answer.
        """
        self._running.clear()
        config = GenerationConfig(max_new_tokens=new_tokens)
        for name, asked in _questions(engines, prompt, home):
            key, engine = (name, asked.digest, new_tokens), engines[name]
            if key in self._cached:
                continue
            tokens: list[int] = []
            self._request = engine, next(_sessions)
            for output in engine.stream(asked, config, session_id=self._request[1]):
                if output.status is ResponseType.CANCEL:
                    raise Stopped
                tokens += output.token_ids
                self._running[key] = engine.model.tokenizer.decode(tokens, skip_special_tokens=True)
                yield f"{name} answers", len(tokens) / new_tokens
            self._request = None
            self._cached[key] = self._running.pop(key, "")

    def html(self, engines: dict[str, Engine], prompt: Prompt, home: Prompt, new_tokens: int) -> str:
        """Return all answers as HTML, as far as they have been generated; arguments as in `stream`."""
        cells = []
        for name, asked in _questions(engines, prompt, home):
            key = (name, asked.digest, new_tokens)
            text = self._cached.get(key)
            text = self._running.get(key, "") + " …" if text is None else text
            role = name if asked is prompt else "ranges as built"
            cells.append(
                f"<div>{escape(engines[name].capabilities.name)} ({escape(role)}): {escape(self._start)}<b>{escape(text)}</b></div>"
            )
        return f'<div style="line-height:1.6;display:flex;gap:4px 40px;flex-wrap:wrap">{"".join(cells)}</div>'


def _questions(engines: dict[str, Engine], prompt: Prompt, home: Prompt) -> list[tuple[str, Prompt]]:
    asked = [(name, prompt) for name in engines]
    return asked if prompt.digest == home.digest else [*asked, (next(iter(engines)), home)]
