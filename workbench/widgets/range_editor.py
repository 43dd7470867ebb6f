"""The range editor: shows a prompt's tokens with draggable embedding ranges, and lint findings after each change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import traitlets

from ..errors import ModelError
from ..linting.lint import lint
from ..models import Model
from ..plots.figure import Figure
from ..plots.tokens import token_strip
from ..plots.visible_text import escaped
from ..prompt import Prompt
from .view import View, source

_MAX_FINDINGS = 20
_MAX_DRAWN = 100  # tokens in the stored image: drawing thousands would take seconds


class RangeEditor(View):
    """A view in which ranges can be dragged, resized, added and removed.

    `prompt` and `embedding_ranges` are always the current ones; setting them updates the view.

    Mouse and touch: drag a range to move it, its ends to resize it. Keyboard: Tab to a range or an end, arrow keys move it (with
    Shift, or Page Up and Down, by ten), Delete removes it, Ctrl+Z and Ctrl+Y undo and redo.

    Args:
        prompt: may be invalid; `findings` lists the problems.
        model: gives the texts of the tokens, and is used by lint.
        target: an engine whose rules lint also applies, such as "turbomind==0.18.0".
        dtype: the engine's dtype, for lint.
        height: maximum height of the strip, in pixels; a longer prompt scrolls.
        items: called with a prompt whose ranges have changed, returns it with other items for them; None keeps the
            items.

    Raises:
        ValueError: `target` or `dtype` is unknown.
    """

    _esm = source("shared.js", "token_lines.js", "range_editor.js")
    _css = source("range_editor.css")

    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    special = traitlets.List(traitlets.Int()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    embedding_ranges = traitlets.List(traitlets.List(traitlets.Int(), minlen=2, maxlen=2)).tag(sync=True)
    findings = traitlets.List(traitlets.Dict()).tag(sync=True)
    hovered = traitlets.Int(-1).tag(sync=True)
    height = traitlets.Int(280).tag(sync=True)
    shades = traitlets.Bytes(b"").tag(sync=True)

    def __init__(
        self,
        prompt: Prompt,
        model: Model,
        target: str | None = None,
        dtype: str | None = None,
        height: int = 280,
        items: Callable[[Prompt], Prompt] | None = None,
    ) -> None:
        lint(prompt, None, target, dtype=dtype)  # raises for an unknown target or dtype now, not at the first drag
        self._prompt, self.model, self.target, self.dtype = prompt, model, target, dtype
        self._items = items
        super().__init__(
            tokens=_texts(prompt, model),
            special=_special(prompt, model),
            labels=[span.label or f"{span.modality} {number}" for number, span in enumerate(prompt.spans)],
            embedding_ranges=[list(pair) for pair in prompt.embedding_ranges],
            height=height,
        )
        self._lint()
        self.observe(lambda change: self._lint(), "embedding_ranges")

    @traitlets.validate("embedding_ranges")
    def _check_ranges(self, proposal: Any) -> list[list[int]]:
        """Refuse what no range is, whoever sends it: traitlets' `Int` accepts booleans, and JavaScript's numbers are exact to 2**53."""
        for pair in proposal.value:
            if any(isinstance(end, bool) or abs(end) > 1 << 53 for end in pair):
                raise traitlets.TraitError(f"embedding_ranges: {pair} is not a pair of positions")
        return proposal.value

    @property
    def prompt(self) -> Prompt:
        """The prompt with the current ranges.

        Its spans are kept while their number is that of the ranges, and dropped otherwise.
        """
        ranges = [(start, stop) for start, stop in self.embedding_ranges]
        spans = self._prompt.spans if len(ranges) == len(self._prompt.spans) else ()
        moved = self._prompt.replace(embedding_ranges=ranges, spans=spans)
        return moved if self._items is None else self._items(moved)

    @prompt.setter
    def prompt(self, prompt: Prompt) -> None:
        self._prompt = prompt
        with self.hold_sync():
            self.tokens = _texts(prompt, self.model)
            self.special = _special(prompt, self.model)
            self.labels = [span.label or f"{span.modality} {number}" for number, span in enumerate(prompt.spans)]
            self.embedding_ranges = [list(pair) for pair in prompt.embedding_ranges]
        self._lint()

    def figure(self) -> Figure:
        """Return all tokens, with the ranges in colour, as a matplotlib figure."""
        return token_strip(self.tokens, self.prompt.embedding_ranges)

    def snapshot(self) -> Figure:
        return token_strip(self.tokens[:_MAX_DRAWN], self.prompt.embedding_ranges)

    def shade(self, values: np.ndarray, bounds: tuple[float, float], colours: bytes, logarithmic: bool) -> None:
        """Underline each token in the colour of its number, `values` `[tokens]`; tokens whose number is NaN are left as they are.

        Args:
            bounds: ends of the colour scale.
            colours: 256 RGB colours, from `view.palette`.
        """
        low, high = bounds
        numbers = np.asarray(values, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.log(numbers / low) / np.log(high / low) if logarithmic else (numbers - low) / (high - low)
        pixels = np.zeros((len(numbers), 4), np.uint8)
        drawn = np.isfinite(share) & np.isfinite(numbers)
        table = np.frombuffer(colours, np.uint8).reshape(-1, 3)
        pixels[drawn, :3] = table[(share[drawn].clip(0.0, 1.0) * 255).round().astype(int)]
        pixels[drawn, 3] = 255
        self.shades = pixels.tobytes()

    def refresh(self) -> None:
        """Run lint again. Call it after a change of what `items` returns, which the editor cannot notice."""
        self._lint()

    def _lint(self) -> None:
        try:
            found = lint(self.prompt, self.model, self.target, dtype=self.dtype)
        except Exception as error:  # an empty list of findings would look like a valid prompt
            self.findings = [_finding("lint-failed", "error", f"lint failed: {type(error).__name__}: {error}")]
            return
        found.sort(key=lambda each: ("error", "warning", "info").index(each.severity))
        self.findings = [dataclasses.asdict(each) for each in found[:_MAX_FINDINGS]]
        if len(found) > _MAX_FINDINGS:
            self.findings = [*self.findings, _finding("more", "info", f"and {len(found) - _MAX_FINDINGS} more")]


def _finding(code: str, severity: str, message: str) -> dict[str, Any]:
    return {"code": code, "severity": severity, "message": message, "item": None}


def _texts(prompt: Prompt, model: Model) -> list[str]:
    return [escaped(token) for token in model.tokens(prompt.input_ids)]


def _special(prompt: Prompt, model: Model) -> list[int]:
    try:
        special = set(model.tokenizer.all_special_ids)
    except ModelError:
        return []
    return [position for position, token in enumerate(prompt.input_ids) if token in special]
