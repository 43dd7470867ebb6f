"""The explorer: a prompt, its images, hidden-state map, answers and verdict in one notebook cell, all linked."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets as w
import numpy as np
from PIL import Image

from ..analysis.state_maps import METRICS, StateMaps, state_maps
from ..comparison import Comparison
from ..comparison.check import shared_taps
from ..comparison.reference_cache import reference_engine
from ..engines.base import TAPS, Engine
from ..engines.freed_memory import return_freed_memory
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.numba_engine.incremental import IncrementalTrace
from ..errors import ModelError, PromptError
from ..faults import FAULTS, FaultyEngine, faults_of
from ..plots.figure import Figure
from ..progress import Stopped
from ..prompt import Prompt
from ..trace import Trace
from . import components
from .answers import Answers
from .comparison_view import ComparisonView
from .hidden_state_map import HiddenStateMap
from .injection_menu import AS_BUILT, InjectionMenu
from .judging import judge, shared_rows
from .key_guard import KeyGuard
from .panel import Panel
from .patch_view import PatchView
from .range_editor import RangeEditor
from .tap_map import TapMap
from .view import close_widgets, palette, snapshot_seconds
from .why_panel import WhyPanel

NO_FAULT = "none"
_PROMPT_FAULTS = tuple(fault.name for fault in faults_of("prompt") if fault.any_prompt)
_QUICK = 500
"""Tokens of a prompt whose map is there almost at once."""
_LATER = {name: METRICS[name].title for name in ("lens", "error")}
"""Metrics of the menu that are computed when they are needed."""
_PAUSE_SECONDS = 0.35  # without a change, before answers are generated


class Explorer(Panel):
    """Linked views of one prompt. After a range is dragged, lint is updated at once; then, in a worker thread, the map,
    the answers of engine and reference, what the answer rests on ("Why", if it is unfolded), and the verdict.

    A new change stops the work for earlier ranges. Errors are shown in the view, not raised.

    Attributes:
        editor, patches, map, verdict, tap_map, why: the views, for use from code.
        view: the widget that contains all of them.

    Args:
        engine: the engine whose hidden states are shown.
        prompt: the initial prompt.
        images: one image per item, in order; None for an item without an image.
        question: the initial text of the question box.
        ask: called with another question, returns its prompt; None omits the question box.
        target: an engine whose rules lint also applies, such as "turbomind==0.18.0".
        judge: compare with the reference after each change; if False, not until the user ticks its box.
        new_tokens: maximum number of tokens in an answer.
        inject: what is injected at first, as in the menu; "as built" is the prompt's own items.
        word: the word for "another word" and "mix".
        fault: the name of a fault to inject into the engine's input at first, as in the menu, or "none".
        answer_start: the end of the prompt's text, shown before every answer.
        on_close: called by `close` at the end, for example to release the engine.

    Raises:
        ValueError: `inject`, `fault` or `target` is unknown, or `new_tokens` is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        images: Sequence[Image.Image | None] = (),
        *,
        question: str = "",
        ask: Callable[[str], Prompt] | None = None,
        target: str | None = None,
        judge: bool = True,
        new_tokens: int = 12,
        inject: str = AS_BUILT,
        word: str = "",
        fault: str = NO_FAULT,
        answer_start: str = "",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        if fault not in (NO_FAULT, *_PROMPT_FAULTS):
            raise ValueError(f"fault={fault!r}: choose one of {', '.join((NO_FAULT, *_PROMPT_FAULTS))}")
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens}: answers need at least 1")
        super().__init__()
        self.engine, self.new_tokens, self._home, self._ask = engine, new_tokens, prompt, ask
        self.reference = reference_engine(engine.model, str(engine.dtype).removeprefix("torch."), "cpu")
        self._taps = shared_taps(engine, list(TAPS))
        self._incremental = IncrementalTrace(engine) if isinstance(engine, NumbaEngine) else None
        self._plain: Trace | None = None
        self._maps: StateMaps | None = None
        self._maps_plain: Trace | None = None  # the run without embeddings that the maps were made from
        self._answers = Answers(answer_start)
        self._on_close = on_close
        self._closed = False
        self._overwritten = False  # whether a run has begun to write its states over those of the map
        self._mapped = threading.Event()  # set by the first map, or by an error that prevented it
        self._map_state = self._verdict_state = ""  # `_state()` when the shown map and verdict were computed
        self._colour_lock = threading.Lock()  # the user may select a layer while the worker sets new maps
        self.map_seconds = math.nan
        """Seconds from the start of the last redraw to its map."""

        dtype = str(engine.dtype).removeprefix("torch.")
        self.injection = InjectionMenu(engine.model, inject, word)
        self.fault = w.Dropdown(
            options=(NO_FAULT, *_PROMPT_FAULTS), value=fault, description="Fault", layout={"width": "230px"}
        )
        self.editor = RangeEditor(
            prompt, engine.model, target=target, dtype=dtype, height=128, items=self.injection.apply
        )
        self.patches = PatchView(prompt, images, width=236 if len(images) < 2 else 180)
        self.map = HiddenStateMap(height=330)
        self.verdict = ComparisonView()
        self.tap_map = TapMap(engine, prompt)
        self.why = WhyPanel(self._why_changed)
        self._part = ""  # of the layers that the map shows: ".attention", ".mlp", or the whole layer
        self._plain_part = ""  # the part that `_plain` has
        self.question = components.text("Question", question, "520px")
        self.back = w.Button(description="Reset ranges", tooltip="back to where they were built", icon="undo")
        self.judge = w.Checkbox(
            value=judge, description="compare automatically", indent=False, layout={"width": "180px"}
        )
        self.words = w.HTML()
        controls: list[w.Widget] = [self.question] if ask else []
        row = {"flex_flow": "row wrap", "align_items": "center"}
        side = w.Box([self.patches], layout={"flex": "0 0 auto", "max_width": "250px", "overflow": "auto"})
        self._optional = (self.question, side)  # not part of every view
        middle = w.Box([self.map], layout={"flex": "1 1 540px", "min_width": "420px"})
        column = w.Box([self.tap_map], layout={"flex": "0 0 auto", "width": "190px"})
        middle.children[0].layout.width = "100%"
        folded = w.Accordion([self.verdict.view], titles=("Comparison with the reference",), selected_index=0)
        self.why_fold = w.Accordion([self.why.view], titles=("Why this answer",), selected_index=None)
        self.view = w.VBox(
            [
                w.HBox([*controls, self.back, self.judge, self.progress, self.doing], layout=row),
                w.HBox([*self.injection.controls, self.fault], layout=row),
                self.editor,
                w.HBox([*([side] if images else []), middle, column], layout={"flex_flow": "row wrap", "grid_gap": "14px"}),
                self.status, self.words, self.why_fold, folded, KeyGuard(),
            ],
            layout={"max_width": components.WIDTH},
        )  # fmt: skip
        self.view.add_class("workbench-view").add_class("workbench-explorer")
        pairs = ((self.editor, self.map), (self.map, self.patches), (self.patches, self.editor))
        self._links = [w.jslink((left, "hovered"), (right, "hovered")) for left, right in pairs]
        self.editor.observe(self._changed, "embedding_ranges")
        self.question.observe(self._question_changed, "value")
        self.judge.observe(self._changed, "value")
        self.fault.observe(self._changed, "value")
        self.injection.observe(self._injection_changed)
        self.back.on_click(lambda button: self._go_home())
        self.map.observe(self._map_changed, ["row", "metric", "scale"])
        self.tap_map.observe(self._tap_chosen, "tap")
        self.why_fold.observe(self._why_changed, "selected_index")
        self._changed()

    @property
    def prompt(self) -> Prompt:
        """The prompt with the current ranges and injected rows."""
        return self.editor.prompt

    @property
    def comparison(self) -> Comparison | None:
        """The comparison for the current prompt and fault, or None if there is none yet."""
        return self.verdict.comparison if self._verdict_state == self._state() else None

    def answer(self, which: str = "engine") -> str:
        """Return the answer to the current prompt, of the "engine" (with its fault, if any) or of the "reference".

        Raises:
            RuntimeError: it has not been generated yet.
        """
        name = next(iter(self._engines())) if which == "engine" else which
        text = self._answers.get(name, self.prompt, self.new_tokens)
        if text is None:
            raise RuntimeError(f"no answer of {which!r} to these ranges yet: call wait(), or look at the view")
        return text

    def close(self) -> None:
        """Stop running work, remove the view, free its widgets and states, and release an engine that `explore` opened."""
        self._closed = True
        self._jobs.close()
        self._answers.cancel()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
        close_widgets(*self._links, *self._optional)
        self.why.close()
        super().close()
        # A notebook keeps the explorer itself in its output history.
        self._plain = self._maps_plain = self._maps = self._incremental = self.map.maps = self.verdict.map.maps = None
        return_freed_memory()

    def figure(self) -> Figure:
        """Wait until everything is drawn, then return the map as it is coloured now as a matplotlib figure."""
        self.wait()
        return self.map.figure()

    def snapshot(self) -> Figure | None:
        usual = 0.4 if len(self._home) <= _QUICK else 0.0
        if self._mapped.wait(snapshot_seconds(usual)):  # for the map only: answers and verdict take seconds longer
            return self.map.figure()
        return self.editor.snapshot()

    @property
    def faulty_engine(self) -> Engine:
        """The engine with the selected fault injected into its input; the engine itself if none is selected."""
        change = self._change()
        return self.engine if change is None else FaultyEngine(self.engine, change)

    def _change(self) -> Callable[[Prompt], Prompt] | None:
        return None if self.fault.value == NO_FAULT else FAULTS[self.fault.value].change

    def _engines(self) -> dict[str, Engine]:
        name = "engine" if self.fault.value == NO_FAULT else f"engine with {self.fault.value}"
        return {name: self.faulty_engine, "reference": self.reference}

    def _state(self) -> str:
        """Digest of what is shown: the prompt and the fault."""
        return f"{self.prompt.digest} {self.fault.value}"

    def _state_or_empty(self) -> str:
        try:
            return self._state()
        except Exception:  # the error that is being shown says what is wrong with the prompt
            return ""

    def _changed(self, change: object = None) -> None:
        super()._changed()
        self._answers.cancel()  # the ranges have changed: stop answers to the old ones, whose prefill can take seconds

    def _injection_changed(self, change: object = None) -> None:
        self.editor.refresh()
        self._changed()

    def _go_home(self) -> None:
        self.editor.prompt = self._home

    def _question_changed(self, change: object = None) -> None:
        if self._ask is None:
            return
        try:
            self._home = self._ask(self.question.value)
        except (PromptError, ModelError) as error:
            self._show_error(error)
            return
        self.editor.prompt = self._home
        self._changed()  # needed if the ranges are unchanged, so that the editor reports no change

    def _run(self, prompt: Prompt, part: str) -> Trace:
        """Run the engine for the map of a part of the layers; of the Numba engine only the tokens from the first change on."""
        progress = self._progress(f"computing {len(prompt)} tokens")
        if part:
            return self.engine.trace(prompt, [f"layers.*{part}"], progress=progress)
        if self._incremental is not None:
            return self._incremental.trace(prompt, progress)
        return self.engine.trace(prompt, self._taps, progress=progress)

    def _draw(self) -> Iterator[None]:
        began = time.perf_counter()
        prompt, home, state = self.prompt, self.injection.apply(self._home), self._state()
        if self._verdict_state == state:
            self.verdict.restate()
        elif self._verdict_state:
            self.verdict.say("plain", "not compared at these ranges yet; the last comparison is shown below")
        self.patches.show(prompt)
        self.tap_map.show(prompt)
        self.map.spans = [list(pair) for pair in prompt.embedding_ranges]
        # After a run that was stopped, the states in memory are not those of the map, even if its ranges are back.
        self.map.stale = self._map_state != "" and (self._map_state != state or self._overwritten)
        bare = prompt.without_embeddings
        part = self._part
        if self._plain is None or self._plain.provenance["prompt"] != bare.digest or self._plain_part != part:
            states = [f"layers.*{part}"] if part else [tap for tap in self._taps if tap != "logits"] or self._taps
            self._plain = self.engine.trace(bare, states, progress=self._progress("computing without embeddings"))
            self._plain_part = part
        yield
        change = self._change()
        self.faulty_engine.check(prompt)
        known, same = self._maps if self._maps_plain is self._plain else None, 0
        self._overwritten = True
        try:
            injected = self._run(prompt if change is None else change(prompt), part)
        except Stopped:
            raise  # the kept states are still those of the maps
        except BaseException:
            self._maps_plain = None
            raise
        incremental = None if part else self._incremental
        self._maps_plain = None  # until the maps are those of the new states
        if incremental is not None:
            same = len(prompt) - incremental.computed
        self._hide_progress()
        maps = state_maps(self.engine, injected, self._plain, prompt, known, same)
        if self._closed:
            return
        self._maps, self._overwritten, self.map.stale = maps, False, False
        self._maps_plain = self._plain
        if self.tap_map.tap in maps.taps:
            self.map.row = list(maps.taps).index(self.tap_map.tap)
        self._add_reads(maps, state)
        self.map.show(maps, _LATER)
        self._colour()
        self._map_state = state
        self.status.value = self._describe(maps, home)
        self.map_seconds = time.perf_counter() - began
        self._mapped.set()
        yield
        if self.map.metric == "lens":
            yield from self._add_lens(maps)
        self._jobs.pause(_PAUSE_SECONDS)  # during a drag, the next map matters more than this one's answers
        yield
        yield from self._stream_answers(prompt, home)
        yield from self._explain(prompt, maps, state, follow=False)
        if self.judge.value:
            yield from self._compare(prompt, maps, state)

    def _explain(self, prompt: Prompt, maps: StateMaps, state: str, *, follow: bool) -> Iterator[None]:
        """Bring the "Why" panel up to date, if it is unfolded, and colour the other views by it; with `follow` the map, too."""
        if self.why_fold.selected_index is not None:
            change = self._change()
            asked = prompt if change is None else change(prompt)
            yield from self.why.explain(self.engine, asked, state, self.new_tokens, self._progress)
            self._hide_progress()
        before = "read" in maps.values
        if self._add_reads(maps, state) or before:
            self.map.show(maps, _LATER)
            if follow and "read" in maps.values:
                self.map.metric = "read"
        self._colour()

    def _add_reads(self, maps: StateMaps, state: str) -> bool:
        """Add the pinned token's attention to the maps, or remove that of another token; return whether there is one."""
        reads = self.why.reads(state) if self.why_fold.selected_index is not None else None
        if reads is None or reads.shape[1] != len(maps.tokens):
            with self._colour_lock:
                maps.values.pop("read", None)
            return False
        rows = [tap.split(".") for tap in maps.taps]
        none = np.full(reads.shape[1], np.nan, np.float32)
        read = np.stack([reads[int(row[1])] if row[0] == "layers" else none for row in rows])
        with self._colour_lock:
            maps.values["read"] = read
        return True

    def _why_changed(self, change: object = None) -> None:
        """Another token was pinned, another colour chosen, or the panel unfolded."""
        if self._map_state == self._state_or_empty() and self._maps is not None:
            self._jobs.submit(self._draw_why)
        else:
            self._changed()

    def _draw_why(self) -> Iterator[None]:
        """The rest of `_draw` for ranges that have not changed."""
        prompt, state, maps = self.prompt, self._state(), self._maps
        if maps is None or self._map_state != state:
            yield from self._draw()
            return
        yield from self._stream_answers(prompt, self.injection.apply(self._home))
        yield from self._explain(prompt, maps, state, follow=True)
        if self.judge.value and self._verdict_state != state:
            yield from self._compare(prompt, maps, state)

    def _describe(self, maps: StateMaps, home: Prompt) -> str:
        change = maps.values["change"]
        if not maps.ranges:
            return components.note(
                "plain", "No range: the prompt has only tokens. A range that you add needs an item with as many rows."
            )
        moved = [a for (a, b), (c, d) in zip(maps.ranges, home.embedding_ranges, strict=False) if (a, b) != (c, d)]
        status = "unchanged" if not moved else "moved"
        text = f"Ranges {status}: {', '.join(f'[{a}, {b})' for a, b in maps.ranges)}."
        if not change.any():
            return components.note("good", f"{text} Every state is the same as without embeddings, bit for bit.")
        first, last = int(change.any(axis=0).argmax()), int((change[-1] > 0).sum())
        return components.note(
            "plain",
            f"{text} The first token whose states change is {first}; at the last layer {last} of {len(maps.tokens)} tokens do.",
        )

    def _stream_answers(self, prompt: Prompt, home: Prompt) -> Iterator[None]:
        """Stream the answers; cached ones are shown at once."""
        engines = self._engines()
        for doing, share in self._answers.stream(engines, prompt, home, self.new_tokens):
            self.words.value = self._answers.html(engines, prompt, home, self.new_tokens)
            self._show_progress(doing, share)
            yield
        self._hide_progress()
        self.words.value = self._answers.html(engines, prompt, home, self.new_tokens)

    def _compare(self, prompt: Prompt, maps: StateMaps, state: str) -> Iterator[None]:
        findings = sum(each["severity"] != "info" for each in self.editor.findings)
        yield from judge(self.verdict, self.faulty_engine, prompt, maps.tokens, findings, self._progress("reference"))
        self._verdict_state = state
        comparison = self.verdict.comparison
        if comparison is not None and shared_rows(comparison, maps.taps):
            maps.add_error(comparison)
        if self.map.metric == "error":
            self.map.refresh()
            self._colour()
        self._hide_progress()

    def _add_lens(self, maps: StateMaps) -> Iterator[None]:
        if "lens" not in maps.values:
            self.map.message = "applying the logit lens to every state …"
            try:
                maps.add_lens(self.engine, self._progress("logit lens"))
            except ModelError as error:  # the engine does not expose its head; answers and verdict go on
                self._hide_progress()
                self.map.clear(str(error))
                return
            yield
        self._hide_progress()
        self.map.refresh()
        self._colour()

    def _tap_chosen(self, change: Any) -> None:
        """Show the chosen tap's row; the map of attention or MLP outputs is computed first if it shows others."""
        tap, maps = self.tap_map.tap, self._maps
        part = _part_of(tap)
        if part != self._part:
            self._part = part
            self._changed()
        elif maps is not None and tap in maps.taps:
            self.map.row = list(maps.taps).index(tap)

    def _map_changed(self, change: Any) -> None:
        """Colour the patches after another layer, metric or scale was selected; compute a missing logit lens."""
        maps = self._maps
        if maps is not None and 0 <= self.map.row < len(maps.taps) and change["name"] == "row":
            tap = maps.taps[self.map.row]
            if _part_of(tap) == self._part:  # else the map of another part has been chosen, and is being computed
                self.tap_map.tap = tap
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
                    "computed with the verdict"
                    if self.judge.value
                    else "computed with the verdict: tick 'compare automatically'"
                )
        self._colour()

    def _colour(self) -> None:
        with self._colour_lock:
            maps, metric, row = self._maps, self.map.metric, self.map.row
            if maps is None:
                return
            row = row if 0 <= row < len(maps.taps) else len(maps.taps) - 1
            unfolded = self.why_fold.selected_index is not None
            why = self.why.token_colours(maps.taps[row], self._state_or_empty()) if unfolded else None
            if why is not None and len(why.values) == len(maps.tokens):
                kind = METRICS[why.metric]
                self.patches.colour(why.values, why.metric, why.bounds, why.caption)
                self.editor.shade(why.values, why.bounds, palette(kind.palette), kind.scale == "log")
                return
            self.editor.shades = b""
            if metric not in maps.values:
                self.patches.clear()
                return
            caption = f"coloured by {metric} at {maps.taps[row]}"
            self.patches.colour(maps.values[metric][row], metric, maps.bounds(metric), caption, self.map.scale)

    def _show_error(self, error: Exception) -> None:
        if self._closed:
            return
        super()._show_error(error)
        if self._map_state != self._state_or_empty():  # what is shown belongs to other ranges
            self.map.clear("these ranges do not run: see the message below")
            self.map.stale, self.map.maps = False, None
            self.patches.clear()
            self.words.value = ""
            self.why.forget("these ranges do not run")
            self.editor.shades = b""
            if self._verdict_state:
                self.verdict.say("plain", "these ranges do not run; the last comparison is shown below")
            self._map_state = ""
        self._mapped.set()


def _part_of(tap: str) -> str:
    """The part of a layer that a tap is: ".attention", ".mlp", or "" for a whole layer, `embed` and `norm`."""
    return f".{tap.rsplit('.', 1)[1]}" if tap.endswith((".attention", ".mlp")) else ""
