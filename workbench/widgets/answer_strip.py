"""An answer as a strip of tokens: pointing at one shows, layer by layer, what would have been said, and which ranges it read."""

from __future__ import annotations

from typing import Any

import numpy as np
import traitlets

from ..analysis.answer_lens import AnswerLens
from ..plots.answer_lens import answer_lens_figure
from ..plots.figure import Figure
from ..plots.visible_text import escaped
from .view import View, source


class AnswerStrip(View):
    """The tokens of an answer, with the logit lens and the attention of the one under the pointer, or of the pinned one.

    A click, Enter or Space pins a token, and a second one releases it; arrow keys go from token to token.

    Traits to link: `pinned`, the index of the pinned token, or -1.

    Args:
        lens: from `workbench.analysis.answer_lens.answer_lens`; `show` replaces it later.
    """

    _esm = source("shared.js", "answer_strip.js")
    _css = source("views.css")

    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    taps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    words: Any = traitlets.List().tag(sync=True)
    chances = traitlets.Bytes(b"").tag(sync=True)
    said = traitlets.Bytes(b"").tag(sync=True)
    right = traitlets.Bytes(b"").tag(sync=True)
    groups = traitlets.List(traitlets.Unicode()).tag(sync=True)
    reads = traitlets.Bytes(b"").tag(sync=True)
    pinned = traitlets.Int(-1).tag(sync=True)
    message = traitlets.Unicode("no answer yet").tag(sync=True)

    def __init__(self, lens: AnswerLens | None = None) -> None:
        super().__init__()
        self.lens: AnswerLens | None = None
        if lens is not None:
            self.show(lens)

    def show(self, lens: AnswerLens) -> None:
        """Show another answer; a pin stays if the answer has as many tokens."""
        self.lens = lens
        with self.hold_sync():
            self.tokens, self.taps = [escaped(text) for text in lens.texts], list(lens.taps)
            self.words = [[escaped(word) for word in row] for row in lens.words]
            self.chances, self.said = _bytes(lens.chances), _bytes(lens.said)
            self.right = (lens.likeliest == np.asarray(lens.tokens)).astype(np.uint8).tobytes()
            self.groups = [escaped(name) for name in lens.groups]
            self.reads = b"" if lens.reads is None else _bytes(lens.reads)
            self.message = ""
            if self.pinned >= len(lens.tokens):
                self.pinned = -1

    def clear(self, message: str) -> None:
        """Remove the answer and show `message` instead."""
        self.lens = None
        with self.hold_sync():
            self.tokens, self.taps, self.words, self.groups = [], [], [], []
            self.chances = self.said = self.right = self.reads = b""
            self.message = message

    def figure(self) -> Figure:
        """Return the lens of all tokens of the answer as a matplotlib figure.

        Raises:
            RuntimeError: no answer is shown.
        """
        if self.lens is None:
            raise RuntimeError(self.message or "no answer yet")
        return answer_lens_figure(self.lens)

    def snapshot(self) -> Figure | None:
        return None if self.lens is None else self.figure()


def _bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, np.float32).tobytes()
