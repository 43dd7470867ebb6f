"""Controls that select what is injected into a prompt: its own rows, or rows made from the embedding table."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w

from ..models import Model
from ..models.embedding_rows import KINDS, injected_rows
from ..prompt import Prompt
from . import components

AS_BUILT = "as built"


class InjectionMenu:
    """Controls that select the rows to inject; `controls` are the widgets.

    Args:
        model: its embedding table gives the rows.
        kind: the initial choice: one of `KINDS`, or "as built" for the prompt's own items.
        word: the word to inject, for "another word" and "mix".

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, model: Model, kind: str = AS_BUILT, word: str = "") -> None:
        if kind not in (AS_BUILT, *KINDS):
            raise ValueError(f"inject={kind!r}: choose one of {', '.join((AS_BUILT, *KINDS))}")
        self.model = model
        self.kind = w.Dropdown(options=(AS_BUILT, *KINDS), value=kind, description="Inject", layout={"width": "220px"})
        self.word = components.text("Word", word, "170px")
        self.share = w.FloatSlider(
            value=0.5, min=0, max=1, step=0.05, description="Share of word", continuous_update=False,
            style={"description_width": "initial"}, layout={"width": "280px"},
        )  # fmt: skip
        self.controls = [self.kind, self.word, self.share]
        self.kind.observe(self._show_needed, "value")
        self._show_needed()

    def apply(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the chosen rows in its ranges.

        Raises:
            PromptError: the word has no tokens.
        """
        if self.kind.value == AS_BUILT:
            return prompt
        rows = [
            injected_rows(
                self.kind.value, self.model, prompt.input_ids[max(start, 0) : max(stop, 0)],
                word=self.word.value, share=self.share.value,
            )
            for start, stop in prompt.embedding_ranges
        ]  # fmt: skip
        return prompt.replace(input_embeddings=rows, deepstack=())

    def observe(self, changed: Callable[[object], None]) -> None:
        """Call `changed` with the change of a control's value, after every change."""
        for control in self.controls:
            control.observe(changed, "value")

    def _show_needed(self, change: object = None) -> None:
        self.word.layout.visibility = "visible" if self.kind.value in ("another word", "mix") else "hidden"
        self.share.layout.visibility = "visible" if self.kind.value == "mix" else "hidden"
