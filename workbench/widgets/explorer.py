"""The whole bench in one cell: prompt, pictures, map, answers, verdict, all linked."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets as w
from matplotlib.figure import Figure
from PIL import Image

from ..compare import Comparison
from ..compare.run import check_with_traces, reference
from ..engines.api import TAPS, Engine
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.numba_engine.warm import WarmRun
from ..errors import ModelError, PromptError
from ..prompt import Prompt
from ..state_maps import METRICS, StateMaps, state_maps
from ..trace import Trace
from . import parts
from .answers import Answers
from .bench import Bench
from .comparison_view import ComparisonView, NextWords
from .hidden_state_map import HiddenStateMap
from .patch_view import PatchView
from .range_editor import RangeEditor

_PAUSE = 0.35  # seconds without a move before answers are asked for


class Explorer(Bench):
    """Drag a range: lint answers at once, then the map, then the engine's and the reference's words, then the verdict.

    Whatever still runs for the ranges before is stopped. Errors stand in the view.

    Attributes:
        editor, patches, map, verdict: the views, for code that drives them.
        view: the widget that holds all of it.

    Args:
        engine: whose hidden states are shown.
        prompt: what the bench begins with.
        pictures: of the items in order.
        ask: builds a prompt from another question; None leaves the question out.
        target: an engine whose view of the prompt lint adds, such as "turbomind==0.18.0".
        judge: compare with the reference after each move; else only once its box is ticked.

    Raises:
        ValueError: new_tokens below 1.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        pictures: Sequence[Image.Image | None] = (),
        *,
        question: str = "",
        ask: Callable[[str], Prompt] | None = None,
        target: str | None = None,
        judge: bool = True,
        new_tokens: int = 12,
    ) -> None:
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens}: answers need at least 1")
        super().__init__()
        self.engine, self.new_tokens, self._home, self._ask = engine, new_tokens, prompt, ask
        self.reference = reference(engine.model, str(engine.dtype).removeprefix("torch."), "cpu")
        self._run: Callable[[Prompt], Trace] = (
            WarmRun(engine).trace if isinstance(engine, NumbaEngine) else lambda prompt: engine.trace(prompt, TAPS)
        )
        self._plain: Trace | None = None
        self._maps: StateMaps | None = None
        self._answers = Answers(engine, self.reference)
        self._mapped = threading.Event()  # the first map is there, or what kept it from coming
        self._shown = self._judged = ""  # digests of the prompts whose map and verdict stand
        self._colouring = threading.Lock()  # a hand chooses layers while the worker brings new maps
        self.map_seconds = math.nan
        """From a change to its map, the last time."""

        dtype = str(engine.dtype).removeprefix("torch.")
        self.editor = RangeEditor(prompt, engine.model, target=target, dtype=dtype, height=128)
        self.patches = PatchView(prompt, pictures, width=236 if len(pictures) < 2 else 180)
        self.map = HiddenStateMap(height=330)
        self.verdict = ComparisonView()
        self.question = parts.text("Question", question, "520px")
        self.back = w.Button(description="Ranges back", tooltip="to where they were built", icon="undo")
        self.judge = w.Checkbox(
            value=judge, description="judge after each move", indent=False, layout={"width": "180px"}
        )
        self.words = w.HTML()
        controls: list[w.Widget] = [self.question] if ask else []
        side = w.Box([self.patches], layout={"flex": "0 0 auto", "max_width": "250px", "overflow": "auto"})
        middle = w.Box([self.map], layout={"flex": "1 1 560px", "min_width": "420px"})
        middle.children[0].layout.width = "100%"
        folded = w.Accordion([self.verdict.view], titles=("Against the reference",), selected_index=0)
        self.view = w.VBox(
            [
                w.HBox([*controls, self.back, self.judge, self.progress, self.doing],
                       layout={"flex_flow": "row wrap", "align_items": "center"}),
                self.editor,
                w.HBox([side, middle] if pictures else [middle], layout={"flex_flow": "row wrap", "grid_gap": "14px"}),
                self.status, self.words, folded,
            ],
            layout={"max_width": parts.WIDTH},
        )  # fmt: skip
        self.view.add_class("workbench-explorer")
        for left, right in ((self.editor, self.map), (self.map, self.patches), (self.patches, self.editor)):
            w.jslink((left, "hovered"), (right, "hovered"))
        self.editor.observe(self._changed, "embedding_ranges")
        self.question.observe(self._asked, "value")
        self.judge.observe(self._changed, "value")
        self.back.on_click(lambda button: self._go_home())
        self.map.observe(self._coloured, ["row", "metric", "scale"])
        self._changed()

    @property
    def prompt(self) -> Prompt:
        """The prompt as the editor has it."""
        return self.editor.prompt

    @property
    def comparison(self) -> Comparison | None:
        """The comparison at these ranges, or None where there is none yet."""
        return self.verdict.comparison if self._judged == self.prompt.digest else None

    def answer(self, which: str = "engine") -> str:
        """What the engine, or the "reference", says to the prompt as it stands.

        Raises:
            RuntimeError: it has not said it yet.
        """
        said = self._answers.get(which, self.prompt, self.new_tokens)
        if said is None:
            raise RuntimeError(f"there is no answer of {which!r} to these ranges yet: call wait(), or look at the view")
        return said

    def close(self) -> None:
        """Stop what runs and take the views down. An open bench keeps its engine's weights in memory."""
        self._jobs.close()
        for widget in (self.editor, self.patches, self.map, self.verdict.map, self.verdict.view, self.view):
            widget.close()

    def figure(self) -> Figure:
        """The map as it is coloured now, as a matplotlib figure."""
        self.wait()
        return self.map.figure()

    def still(self) -> Figure | None:
        self._mapped.wait(60.0)  # the map alone: answers and verdict come seconds later
        return self.map.figure()

    def _go_home(self) -> None:
        self.editor.prompt = self._home

    def _asked(self, change: object = None) -> None:
        if self._ask is None:
            return
        try:
            self._home = self._ask(self.question.value)
        except (PromptError, ModelError) as error:
            self._show_error(error)
            return
        self.editor.prompt = self._home
        self._changed()  # the ranges may be where they were

    def _draw(self) -> Iterator[None]:
        began = time.perf_counter()
        prompt, home = self.prompt, self._home
        if self._judged == prompt.digest:
            self.verdict.restate()
        elif self._judged:
            self.verdict.say("plain", "not compared at these ranges yet; below is what was compared last")
        self.patches.show(prompt)
        self.map.spans = [list(pair) for pair in prompt.embedding_ranges]
        bare = prompt.bare
        if self._plain is None or self._plain.provenance["prompt"] != bare.digest:
            self._plain = self.engine.trace(bare, TAPS[:-1])
        yield
        injected = self._run(prompt)
        self._maps = maps = state_maps(self.engine, injected, self._plain, prompt)
        self.map.show(maps, {"lens": METRICS["lens"].title, "error": METRICS["error"].title})
        self._colour()
        self._shown = prompt.digest
        self.status.value = self._describe(maps, home)
        self.map_seconds = time.perf_counter() - began
        self._mapped.set()
        yield
        if self.map.metric == "lens":
            yield from self._add_lens(maps)
        self._jobs.pause(_PAUSE)  # a hand that drags wants the next map, not this one's answer
        yield
        yield from self._say(prompt, home)
        if self.judge.value:
            yield from self._judge(prompt, maps)

    def _describe(self, maps: StateMaps, home: Prompt) -> str:
        change = maps.values["change"]
        if not maps.ranges:
            return parts.note(
                "plain", "No range: the prompt is its tokens. Add one, and it needs an item of as many rows."
            )
        moved = [a for (a, b), (c, d) in zip(maps.ranges, home.embedding_ranges, strict=False) if (a, b) != (c, d)]
        place = "where they were built" if not moved else "moved"
        said = f"Ranges {place}: {', '.join(f'[{a}, {b})' for a, b in maps.ranges)}."
        if not change.any():
            return parts.note("good", f"{said} Every state is the same as without embeddings, bit for bit.")
        first, last = int(change.any(axis=0).argmax()), int((change[-1] > 0).sum())
        return parts.note(
            "plain",
            f"{said} The first token whose states change is {first}; at the last layer {last} of {len(maps.tokens)} do.",
        )

    def _say(self, prompt: Prompt, home: Prompt) -> Iterator[None]:
        """Stream the answers; known ones are shown at once."""
        for doing, share in self._answers.stream(prompt, home, self.new_tokens):
            self.words.value = self._answers.html(prompt, home, self.new_tokens)
            self._told(doing, share)
            yield
        self._quiet()
        self.words.value = self._answers.html(prompt, home, self.new_tokens)

    def _judge(self, prompt: Prompt, maps: StateMaps) -> Iterator[None]:
        """The verdict on the engine at these ranges; the reference runs in float64 and four times in the dtype."""
        self.verdict.say("plain", "comparing with Transformers …")
        comparison, truth, run = check_with_traces(self.engine, prompt, progress=self._progress("reference"))
        yield
        names = {"Transformers, float64": truth, f"{self.engine.capabilities.name}, {comparison.dtype}": run}
        self.verdict.show(comparison, prompt, maps.tokens, NextWords.of_traces(self.engine.model, names))
        self._judged = prompt.digest
        maps.add_error(comparison)
        if self.map.metric == "error":
            self.map.refresh()
            self._colour()
        self._quiet()

    def _add_lens(self, maps: StateMaps) -> Iterator[None]:
        if "lens" not in maps.values:
            self.map.message = "reading every state through the head …"
            maps.add_lens(self.engine, self._progress("logit lens"))
            yield
        self._quiet()
        self.map.refresh()
        self._colour()

    def _coloured(self, change: Any) -> None:
        """Another layer or metric was chosen; what is missing is computed."""
        maps = self._maps
        if (
            maps is not None
            and change["name"] == "metric"
            and self.map.metric in METRICS
            and self.map.metric not in maps.values
        ):
            if self.map.metric == "lens":
                self._changed()
            else:
                self.map.message = (
                    "comes with the verdict" if self.judge.value else "comes with the verdict: tick its box"
                )
        self._colour()

    def _colour(self) -> None:
        with self._colouring:
            maps, metric, row = self._maps, self.map.metric, self.map.row
            if maps is None:
                return
            if metric not in maps.values:
                self.patches.clear()
                return
            row = row if 0 <= row < len(maps.taps) else len(maps.taps) - 1
            caption = f"coloured by {metric} at {maps.taps[row]}"
            self.patches.colour(maps.values[metric][row], metric, maps.bounds(metric), caption, self.map.scale)

    def _show_error(self, error: Exception) -> None:
        super()._show_error(error)
        if self._shown != self.prompt.digest:  # what stands is of other ranges
            self.map.clear("the ranges as they are do not run: see the message below")
            self.patches.clear()
            self.words.value = ""
            if self._judged:
                self.verdict.say("plain", "the ranges as they are do not run; below is what was compared last")
            self._shown = ""
        self._mapped.set()
