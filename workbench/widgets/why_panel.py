"""Why: what each layer would have said at every token of the answer, what that token read, and what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import NamedTuple

import ipywidgets as w
import numpy as np

from ..analysis.answer_lens import AnswerLens, answer_lens
from ..analysis.attribution import Attribution, attribute
from ..engines.base import Engine
from ..errors import ModelError, PromptError
from ..plots.attribution import attribution_figure
from ..plots.figure import Figure
from ..progress import Progress
from ..prompt import Prompt
from . import components
from .answer_strip import AnswerStrip
from .view import Composite

MAP, READS, RESTS = "the map", "what it reads", "what it rests on"


class TokenColours(NamedTuple):
    """Numbers `[tokens]` of a prompt, the metric they belong to, the ends of their colour scale, and what they are."""

    values: np.ndarray
    metric: str
    bounds: tuple[float, float]
    caption: str


class WhyPanel(Composite):
    """The answer as a strip of tokens with lens and attention; the pinned token's attention or ablation can colour other views.

    Attributes:
        strip: the answer; pin a token there.
        colour: what images, tokens and map are coloured by: the map's own metric, what the pinned token reads (its attention, mean over
            heads) or what it rests on (its log odds, when rows are replaced).

    Args:
        changed: called when another token is pinned, or another colour is chosen.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.strip = AnswerStrip()
        self.colour = w.ToggleButtons(
            options=(MAP, READS, RESTS), value=MAP, description="Colour by", style={"button_width": "130px", "description_width": "initial"}, layout={"margin": "8px 0"},
            tooltips=("the metric that the map shows", "attention of the pinned token, mean over heads", "replace rows, and measure the odds"),
        )  # fmt: skip
        self.found = w.HTML()
        self.view = w.VBox([self.strip, self.colour, self.found])
        self._of = ""  # what the answer belongs to
        self._attributions: dict[int, Attribution] = {}
        self._asked: Prompt | None = None
        self._changed = changed
        self.colour.observe(lambda change: changed(), "value")
        self.strip.observe(lambda change: self._pinned_another(), "pinned")

    @property
    def lens(self) -> AnswerLens | None:
        """The lens of the answer that is shown."""
        return self.strip.lens

    @property
    def attribution(self) -> Attribution | None:
        """What the pinned token, or the whole answer, rests on; None if it was not measured."""
        return self._attributions.get(self.strip.pinned)

    def figure(self) -> Figure:
        """Return what the answer rests on, if that is chosen, and else the lens of its tokens.

        Raises:
            RuntimeError: no answer is shown.
        """
        if self.colour.value == RESTS and self.attribution is not None:
            return attribution_figure(self.attribution)
        return self.strip.figure()

    def close(self) -> None:
        self.strip.lens, self._asked = None, None
        self._attributions.clear()
        super().close()

    def forget(self, message: str) -> None:
        """Remove what belongs to earlier ranges, and show `message`."""
        self._of = ""
        self._attributions.clear()
        self.found.value = ""
        self.strip.clear(message)

    def explain(
        self, engine: Engine, prompt: Prompt, of: str, max_tokens: int, progress: Callable[[str], Progress]
    ) -> Iterator[None]:
        """Compute what is shown and is not known yet; yields between the parts.

        Args:
            engine, prompt: what is asked.
            of: names the answer: what was computed for the same name is kept.
            max_tokens: of the answer.
            progress: returns the progress callback of a part by its name.
        """
        if self._of != of:
            self.forget("asking …")
            try:
                lens = answer_lens(engine, prompt, max_tokens=max_tokens, progress=progress("layers of the answer"))
            except (ModelError, ValueError) as error:
                self.strip.clear(str(error))
                return
            self._asked, self._of = prompt, of
            self.strip.show(lens)
            yield
        shown, pinned = self.strip.lens, self.strip.pinned
        if shown is None or self.colour.value != RESTS or pinned in self._attributions:
            self._say()
            return
        answer = list(shown.tokens) if pinned < 0 else list(shown.tokens[: pinned + 1])
        try:
            self._attributions[pinned] = attribute(
                engine, prompt, None if pinned < 0 else slice(pinned, pinned + 1), answer=answer,
                progress=progress("replacing rows"),
            )  # fmt: skip
        except (ModelError, PromptError) as error:
            self.found.value = components.note("plain", escape(str(error)))
            return
        self._say()
        yield

    def token_colours(self, tap: str, of: str) -> TokenColours | None:
        """The numbers that colour the tokens, at the layer of a tap; None for those of the map, or if they are not known yet.

        `of`: what is shown, as in `explain`; nothing is known of anything else.
        """
        lens, pinned, asked = self.strip.lens, self.strip.pinned, self._asked
        if lens is None or asked is None or self.colour.value == MAP or self._of != of:
            return None
        if self.colour.value == READS:
            if lens.attention is None or pinned < 0:
                return None
            parts = tap.split(".")
            layer = int(parts[1]) if len(parts) > 1 else None
            weights = lens.attention[:, pinned, : len(asked)]
            values = weights.mean(axis=0) if layer is None else weights[layer]
            where = "all layers" if layer is None else f"layer {layer}"
            return TokenColours(
                values, "read", (1e-4, 1.0), f"attention of {lens.texts[pinned]!r} in {where}, mean over heads"
            )
        found = self.attribution
        if found is None:
            return None
        values = np.full(len(asked), np.nan, np.float32)
        for number, (start, stop) in enumerate(asked.embedding_ranges):
            values[start:stop] = np.where(found.significant(number), found.rows(number), np.nan)
        largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        return TokenColours(values, "rests", (-largest, largest), f"nats that {found.text!r} loses without a row")

    def reads(self, of: str) -> np.ndarray | None:
        """The pinned token's attention, mean over heads, float32 `[layers, tokens]`; None if no token is pinned or it is not known.

        `of`: as in `token_colours`.
        """
        lens, pinned, asked = self.strip.lens, self.strip.pinned, self._asked
        if lens is None or lens.attention is None or asked is None or pinned < 0:
            return None
        if self.colour.value != READS or self._of != of:
            return None
        return lens.attention[:, pinned, : len(asked)]

    def _pinned_another(self) -> None:
        if (
            self.strip.pinned >= 0
            and self.colour.value == MAP
            and self.lens is not None
            and self.lens.reads is not None
        ):
            self.colour.value = READS  # its observer calls `changed`
        else:
            self._changed()

    def _say(self) -> None:
        text = ""
        if self.colour.value == READS and self.strip.pinned < 0:
            text = "Pin a token of the answer: its attention then colours images, tokens and map."
        elif self.colour.value == RESTS and self.attribution is not None:
            text = f"<pre style='margin:0;line-height:1.35'>{escape(str(self.attribution))}</pre>"
        self.found.value = components.note("plain", text) if text else ""
