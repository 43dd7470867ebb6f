"""What an engine and the reference say to a prompt: streamed, kept, shown side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from html import escape

from ..engines.api import Engine
from ..engines.messages import GenerationConfig
from ..prompt import Prompt

_MOST = 200  # that are kept
_Key = tuple[str, str, int]


class Answers:
    """Answers of an "engine" and of the "reference" by prompt; where ranges have moved, the engine's to the prompt as built, too."""

    def __init__(self, engine: Engine, reference: Engine) -> None:
        self._engines = {"engine": engine, "reference": reference}
        self._kept: OrderedDict[_Key, str] = OrderedDict()
        self._running: dict[_Key, str] = {}

    def get(self, which: str, prompt: Prompt, new_tokens: int) -> str | None:
        """A whole answer, or None where it has not been given yet."""
        return self._kept.get((which, prompt.digest, new_tokens))

    def stream(self, prompt: Prompt, home: Prompt, new_tokens: int) -> Iterator[tuple[str, float]]:
        """Ask for what is not known; yields after each step what is being done and its share. May be dropped at any step.

        `home` is the prompt as it was built, its ranges not moved.
        """
        self._running.clear()
        config = GenerationConfig(max_new_tokens=new_tokens)
        for name, asked in _asked(prompt, home):
            key, engine = (name, asked.digest, new_tokens), self._engines[name]
            if key in self._kept:
                continue
            said: list[int] = []
            for output in engine.stream(asked, config):
                said += output.token_ids
                self._running[key] = engine.model.tokenizer.decode(said, skip_special_tokens=True)
                yield f"{name} answers", len(said) / new_tokens
            self._kept[key] = self._running.pop(key, "")
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)

    def html(self, prompt: Prompt, home: Prompt, new_tokens: int) -> str:
        """All of them side by side, as far as they have come."""
        cells = []
        for name, asked in _asked(prompt, home):
            key = (name, asked.digest, new_tokens)
            text = self._kept.get(key, self._running.get(key, "") + " …")
            role = name if asked is prompt else "ranges as built"
            cells.append(f"<div>{escape(self._engines[name].capabilities.name)} ({role}): <b>{escape(text)}</b></div>")
        return f'<div style="line-height:1.6;display:flex;gap:4px 40px;flex-wrap:wrap">{"".join(cells)}</div>'


def _asked(prompt: Prompt, home: Prompt) -> list[tuple[str, Prompt]]:
    both = [("engine", prompt), ("reference", prompt)]
    return both if prompt.digest == home.digest else [*both, ("engine", home)]
