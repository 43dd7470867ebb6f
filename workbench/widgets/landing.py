"""The bench of notebook 01: choose a prompt, what to inject and where, and see it land."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import ipywidgets as w
from matplotlib.figure import Figure

from ..engines.api import Engine
from ..engines.messages import GenerationConfig
from ..injections import KINDS, injected_rows
from ..landing import land
from ..plots.landing import Landing, LandingPicture, landing_figure
from ..prompt import Prompt
from ..trace import Trace
from . import parts
from .bench import Bench


class LandingBench(Bench):
    """Controls and picture for one engine; `bench.prompt` is the prompt as the controls say.

    The picture is drawn first, then the answers, word by word; moving a control drops what is still running.
    """

    def __init__(
        self,
        engine: Engine,
        question: str = "What is the capital of France?",
        answer_start: str = "The capital is",
        word: str = " Japan",
        placeholder: str = " France",
        kind: str = "another word",
        new_tokens: int = 8,
    ) -> None:
        super().__init__()
        self.engine, self.new_tokens = engine, new_tokens
        self._plain: Trace | None = None
        self._picture: LandingPicture | None = None
        self._answers: dict[str, str] = {}
        self._landing: Landing | None = None

        self.question = parts.text("Question", question, "520px")
        self.answer_start = parts.text("The answer begins with", answer_start, "400px")
        self.kind = w.Dropdown(options=KINDS, value=kind, description="Inject", layout={"width": "220px"})
        self.word = parts.text("Word", word, "200px")
        self.share = w.FloatSlider(
            value=0.5, min=0, max=1, step=0.05, description="Share of word", continuous_update=False,
            style={"description_width": "initial"}, layout={"width": "300px"},
        )  # fmt: skip
        ids = self._ids()
        at = engine.model.position_of(placeholder, ids, otherwise=max(len(ids) - 2, 0))
        self._start = parts.slider("Range starts at", at, 0, len(ids) - 1, "first position that is replaced")
        self._rows = parts.slider("and holds", 1, 1, len(ids) - at, "number of tokens that are replaced")
        self.start, self.rows = self._start.children[0], self._rows.children[0]
        self.words, self.details = w.HTML(), w.HTML()
        self.image = parts.picture()
        self.view = w.VBox(
            [
                w.HBox([self.question, self.answer_start], layout={"flex_flow": "row wrap"}),
                w.HBox([self.kind, self.word, self.share], layout={"flex_flow": "row wrap"}),
                w.HBox([self._start, self._rows], layout={"flex_flow": "row wrap"}),
                self.status, self.image, self.words, self.details,
            ]
        )  # fmt: skip
        self.view.add_class("workbench-landing")
        for control in (self.question, self.answer_start):
            control.observe(self._new_text, "value")
        self._observe(self.kind, self.word, self.share, self.start, self.rows)
        self._changed()

    @property
    def prompt(self) -> Prompt:
        """The prompt that the controls describe."""
        ids = self._ids()
        start, stop = self.start.value, min(self.start.value + self.rows.value, len(ids))
        rows = injected_rows(
            self.kind.value, self.engine.model, ids[start:stop], word=self.word.value, share=self.share.value
        )
        return Prompt(ids, [rows], [(start, stop)])

    def figure(self) -> Figure:
        """The picture as a matplotlib figure, for papers."""
        self.wait()
        if self._landing is None:
            raise RuntimeError("there is no picture yet: look at the message above the bench")
        return landing_figure(self._landing)

    def _ids(self) -> list[int]:
        model = self.engine.model
        return model.chat_ids(self.question.value) + model.tokenizer.encode(
            self.answer_start.value, add_special_tokens=False
        )

    def _new_text(self, change: object = None) -> None:
        self.start.max = len(self._ids()) - 1
        self._changed()

    def _changed(self, change: object = None) -> None:
        self.rows.max = max(len(self._ids()) - self.start.value, 1)
        uses_word = self.kind.value in ("another word", "mix")
        self.word.layout.visibility = "visible" if uses_word else "hidden"
        self.share.layout.visibility = "visible" if self.kind.value == "mix" else "hidden"
        super()._changed()

    def _draw(self) -> Iterator[None]:
        prompt = self.prompt
        landing, self._plain = land(self.engine, prompt, self._plain)
        self._landing = landing
        if self._picture is None or self._picture.shape != (tuple(landing.tokens), tuple(landing.taps)):
            self._picture = LandingPicture(landing)
        self.image.value = self._picture.png(landing)
        self.status.value = self._describe(landing)
        self.details.value = self._table(landing)
        self._jobs.pause(0.3)  # a hand that drags wants the next picture, not this one's answer
        yield
        yield from self._answer(prompt)

    def _describe(self, landing: Landing) -> str:
        (start, stop) = landing.ranges[0]
        place = f"Rows injected into [{start}, {stop}): {escape(''.join(landing.tokens[start:stop])) or '?'}."
        if not landing.change.any():
            return parts.note(
                "good", f"{place} Every hidden state is the same as without injection, <b>bit for bit</b>."
            )
        first = int(landing.change.any(axis=0).argmax())
        touched = int((landing.change[-1] > 0).sum())
        return parts.note(
            "plain",
            f"{place} Nothing before position {first} changes, not by a single bit; at the last layer {touched} of "
            f"{len(landing.tokens)} tokens do.",
        )

    def _table(self, landing: Landing) -> str:
        rows = [
            [str(i), token, "yes" if landing.ranges[0][0] <= i < landing.ranges[0][1] else "",
             f"{landing.change[0, i]:.2g}", f"{landing.change[-1, i]:.2g}", f"{landing.cosine[-1, i]:.4f}"]
            for i, token in enumerate(landing.tokens)
        ]  # fmt: skip
        header = ["position", "token", "injected", "change at embed", "change at norm", "cosine at norm"]
        return parts.table(header, rows, "The picture as a table")

    def _answer(self, prompt: Prompt) -> Iterator[None]:
        """Stream both answers; the plain one is kept for the next move."""
        config = GenerationConfig(max_new_tokens=self.new_tokens)
        bare = prompt.bare
        for name, which in (("injected", prompt), ("plain", bare)):
            if which.digest in self._answers:
                continue
            tokens: list[int] = []
            for output in self.engine.stream(which, config):
                tokens += output.token_ids
                self._show_answers(prompt, bare, {name: self._decode(tokens) + " …"})
                yield
            self._answers[which.digest] = self._decode(tokens)
        self._show_answers(prompt, bare, {})

    def _decode(self, tokens: list[int]) -> str:
        return self.engine.model.tokenizer.decode(tokens)

    def _show_answers(self, prompt: Prompt, bare: Prompt, running: dict[str, str]) -> None:
        lines = []
        for name, which in (("plain", bare), ("injected", prompt)):
            answer = running.get(name, self._answers.get(which.digest, "…"))
            lines.append(f"<b>{name}</b>: {escape(self.answer_start.value)}<b>{escape(answer)}</b>")
        self.words.value = f'<div style="line-height:1.6">{"<br>".join(lines)}</div>'
