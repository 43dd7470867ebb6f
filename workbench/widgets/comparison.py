"""The bench of notebook 02: an engine against the reference, clean or with a fault planted."""

from __future__ import annotations

from collections.abc import Iterator

import ipywidgets as w
from matplotlib.figure import Figure

from ..compare import Comparison, FaultyEngine
from ..compare.faults import FAULTS
from ..compare.run import check_with_traces
from ..engines import open_engine
from ..engines.api import Engine
from ..injections import injected_rows
from ..models import Model
from ..prompt import Prompt
from . import parts
from .bench import Bench
from .comparison_view import ComparisonView, NextWords

CLEAN = "none"


class ComparisonBench(Bench):
    """Choose the engine's dtype, a fault and a range; see verdict, error by layer, and where it is more than noise."""

    def __init__(
        self,
        model: Model,
        question: str = "What is the capital of France?",
        word: str = " Japan",
        placeholder: str = " of",
        rows: int = 2,
        kind: str = "numba",
    ) -> None:
        super().__init__()
        self.model, self.kind, self.word = model, kind, word
        self.ids = model.chat_ids(question)
        self._engines: dict[str, Engine] = {}
        at = model.position_of(placeholder, self.ids, otherwise=len(self.ids) // 2)
        self.dtype = w.Dropdown(options=["float32", "bfloat16", "float16"], description="Engine runs in")
        self.dtype.style.description_width = "initial"
        self.fault = w.Dropdown(options=[CLEAN, *FAULTS], description="Fault")
        self._start = parts.slider("Range starts at", at, 0, len(self.ids) - 3, "first position that is replaced")
        self._rows = parts.slider("and holds", rows, 1, 8, "number of tokens that are replaced")
        self.start, self.rows = self._start.children[0], self._rows.children[0]
        self.verdict = ComparisonView()
        self.view = w.VBox(
            [
                w.HBox([self.dtype, self.fault, self.progress, self.doing], layout={"flex_flow": "row wrap"}),
                w.HBox([self._start, self._rows], layout={"flex_flow": "row wrap"}),
                self.status, self.verdict.view,
            ]
        )  # fmt: skip
        self.view.add_class("workbench-comparison")
        self._observe(self.dtype, self.fault, self.start, self.rows)
        self._changed()

    @property
    def prompt(self) -> Prompt:
        """The prompt that the controls describe."""
        start, stop = self.start.value, min(self.start.value + self.rows.value, len(self.ids) - 1)
        rows = injected_rows("mix", self.model, self.ids[start:stop], word=self.word)
        return Prompt(self.ids, [rows], [(start, stop)])

    @property
    def comparison(self) -> Comparison | None:
        """The last comparison."""
        return self.verdict.comparison

    def figure(self) -> Figure:
        """The last comparison's picture; see `ComparisonView.figure`."""
        self.wait()
        return self.verdict.figure()

    def _draw(self) -> Iterator[None]:
        prompt, engine = self.prompt, self._engine(self.dtype.value, self.fault.value)
        self.status.value = ""
        self.verdict.say("plain", "comparing with Transformers …")
        comparison, truth, run = check_with_traces(engine, prompt, progress=self._progress("comparing"))
        yield
        words = NextWords.of_traces(self.model, {"Transformers, float64": truth, f"engine, {comparison.dtype}": run})
        self.verdict.show(comparison, prompt, self.model.tokens(prompt.input_ids), words)
        self._quiet()

    def _show_error(self, error: Exception) -> None:
        super()._show_error(error)
        below = "; below is what was compared last" if self.comparison else ""
        self.verdict.say("plain", f"not compared: see the message above{below}")

    def _engine(self, dtype: str, fault: str) -> Engine:
        if dtype not in self._engines:
            self._engines[dtype] = open_engine(self.kind, self.model, dtype=dtype)
        engine = self._engines[dtype]
        return engine if fault == CLEAN else FaultyEngine(engine, FAULTS[fault])
