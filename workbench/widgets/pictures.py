"""The bench of notebook 03: pictures, their patches, and a prompt whose ranges can be moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import ipywidgets as w
from matplotlib.figure import Figure

from ..engines.api import Engine
from ..engines.messages import GenerationConfig
from ..patch_map import PatchMap, patch_of
from ..plots.patches import patch_figure
from ..plots.png import to_png
from ..prompt import Prompt
from ..ranges import shift
from ..vision.build import build_prompt
from ..vision.images import Picture, open_image
from ..vision.tower import VisionTower
from . import parts
from .bench import Bench

_FURTHEST = 4  # tokens that ranges may be moved


class PictureBench(Bench):
    """Ask about pictures, move the ranges, see what the engine answers."""

    def __init__(
        self, engine: Engine, tower: VisionTower, images: Sequence[Picture], question: str, new_tokens: int = 12
    ) -> None:
        super().__init__()
        self.engine, self.tower, self.new_tokens = engine, tower, new_tokens
        self.pictures = [open_image(image) for image in images]
        self._features = tower.features(self.pictures)
        self._answers: dict[str, tuple[str, float]] = {}
        self._map: PatchMap | None = None

        self.question = parts.text("Question", question, "520px")
        self._shift = parts.slider("Move the ranges by", 0, -_FURTHEST, _FURTHEST, "tokens; 0 is where they belong")
        rows = sum(len(features.rows) for features in self._features)
        self._row = parts.slider("Show row", rows // 2, 0, rows - 1, "of the features of all pictures, in order")
        self.shift, self.row = self._shift.children[0], self._row.children[0]
        self.words, self.details = w.HTML(), w.HTML()
        self.image = parts.picture()
        self.view = w.VBox(
            [
                self.question,
                w.HBox([self._shift, self._row], layout={"flex_flow": "row wrap"}),
                self.status, self.image, self.words, self.details,
            ]
        )  # fmt: skip
        self.view.add_class("workbench-pictures")
        self._observe(self.question, self.shift, self.row)
        self._changed()

    @property
    def prompt(self) -> Prompt:
        """The prompt that the controls describe."""
        return self._moved(self._home())

    @property
    def answer(self) -> str:
        """What the engine says to `prompt`, once it is there."""
        return self._answers[self.prompt.digest][0]

    def figure(self) -> Figure:
        """The picture as a matplotlib figure, for papers."""
        self.wait()
        if self._map is None:
            raise RuntimeError("there is no picture yet: look at the message above the bench")
        return patch_figure(self._map)

    def _home(self) -> Prompt:
        return build_prompt(
            self.engine.model, self.question.value, self.pictures, tower=self.tower, features=self._features
        )

    def _allowed(self, home: Prompt) -> int:
        """The shift, kept inside the prompt."""
        ranges = home.embedding_ranges
        return max(-ranges[0][0], min(self.shift.value, len(home) - ranges[-1][1]))

    def _moved(self, home: Prompt) -> Prompt:
        return home.replace(embedding_ranges=shift(home.embedding_ranges, self._allowed(home)))

    def _draw(self) -> Iterator[None]:
        home = self._home()
        prompt = self._moved(home)
        tokens_of = self.engine.model.tokens(home.input_ids)
        self._map = PatchMap(self.pictures, home, tokens_of, self._allowed(home), self._chosen(home))
        self.image.value = to_png(patch_figure(self._map))
        self.status.value = self._describe(self._map)
        self.details.value = self._table(self._map)
        self.words.value = self._words(home, prompt)
        self._jobs.pause(0.3)  # a hand that drags wants the next picture, not this one's answer
        yield
        for which in (home, prompt):
            if which.digest not in self._answers:
                tokens: list[int] = []
                probability = 1.0
                config = GenerationConfig(max_new_tokens=self.new_tokens, logprobs=1)
                for output in self.engine.stream(which, config):
                    if output.token_ids and not tokens and output.logprobs:
                        probability = math.exp(output.logprobs[0][output.token_ids[0]])
                    tokens += output.token_ids
                    yield
                self._answers[which.digest] = self.engine.model.tokenizer.decode(tokens), probability
        self.words.value = self._words(home, prompt)

    def _chosen(self, home: Prompt) -> tuple[int, int]:
        row = self.row.value
        for item, rows in enumerate(home.input_embeddings):
            if row < len(rows):
                return item, row
            row -= len(rows)
        raise AssertionError("the slider ends at the last row")

    def _describe(self, shown: PatchMap) -> str:
        kinds = shown.kinds()
        lost = [shown.tokens[place] for place, kind in enumerate(kinds) if kind == "lost"]
        if not lost:
            return parts.note("good", "Every row stands over its placeholder.")
        bare = [place for place, kind in enumerate(kinds) if kind == "bare"]
        return parts.note(
            "bad",
            f"Moved by {shown.shift:+d}: {len(lost)} text token{'s' * (len(lost) > 1)} lost under rows "
            f"({escape(', '.join(map(repr, lost)))}), placeholder{'s' * (len(bare) > 1)} bare at {', '.join(map(str, bare))}.",
        )

    def _table(self, shown: PatchMap) -> str:
        rows = []
        for item, (start, stop) in enumerate(shown.moved):
            grid = shown.prompt.spans[item].grid or (1, 1)
            for row in range(stop - start):
                y, x = patch_of(row, grid)
                rows.append([str(item), str(row), f"({y}, {x})", str(start + row)])
        return parts.table(["picture", "row", "patch", "token"], rows, "The map as a table")

    def _words(self, home: Prompt, prompt: Prompt) -> str:
        lines = []
        for name, which in (("in place", home), ("moved", prompt)):
            said, probability = self._answers.get(which.digest, ("…", 0.0))
            sure = f" <span style='color:#8a8a8a'>(first token {probability:.0%} sure)</span>" if probability else ""
            lines.append(f"<b>{name}</b>: <b>{escape(said)}</b>{sure}")
        return f'<div style="line-height:1.6">{"<br>".join(lines)}</div>'
