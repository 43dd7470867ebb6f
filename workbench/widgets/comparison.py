"""The bench of notebook 02: an engine against the reference, clean or with a fault planted."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import ipywidgets as w
from matplotlib.figure import Figure

from ..compare import Comparison, FaultyEngine, compare
from ..compare.faults import FAULTS
from ..compare.run import reference
from ..engines import open_engine
from ..engines.api import Engine
from ..injections import injected_rows
from ..models import Model
from ..plots.errors import error_by_layer, ratio_map
from ..plots.png import to_png
from ..prompt import Prompt
from ..taps import EVERY_TAP
from ..trace import Trace
from . import parts
from .bench import Bench

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
        self._traces: dict[tuple[str, str, str], list[Trace]] = {}
        self.comparison: Comparison | None = None
        at = model.position_of(placeholder, self.ids, otherwise=len(self.ids) // 2)
        self.dtype = w.Dropdown(options=["float32", "bfloat16", "float16"], description="Engine runs in")
        self.dtype.style.description_width = "initial"
        self.fault = w.Dropdown(options=[CLEAN, *FAULTS], description="Fault")
        self._start = parts.slider("Range starts at", at, 0, len(self.ids) - 3, "first position that is replaced")
        self._rows = parts.slider("and holds", rows, 1, 8, "number of tokens that are replaced")
        self.start, self.rows = self._start.children[0], self._rows.children[0]
        self.progress = w.IntProgress(min=0, max=3, description="", layout={"width": "200px"})
        self.details = w.HTML()
        self.chart = parts.picture()
        self.map = parts.picture()
        self.view = w.VBox(
            [
                w.HBox([self.dtype, self.fault, self.progress], layout={"flex_flow": "row wrap"}),
                w.HBox([self._start, self._rows], layout={"flex_flow": "row wrap"}),
                self.status, self.chart, self.map, self.details,
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

    def figures(self) -> tuple[Figure, Figure]:
        """Error by layer and the map, as matplotlib figures."""
        self.wait()
        if self.comparison is None:
            raise RuntimeError("there is no comparison yet: look at the message above the bench")
        prompt = self.prompt
        return error_by_layer(self.comparison), ratio_map(
            self.comparison, self.model.tokens(prompt.input_ids), prompt.embedding_ranges
        )

    def _draw(self) -> Iterator[None]:
        prompt, dtype, fault = self.prompt, self.dtype.value, self.fault.value
        self.progress.value, self.progress.layout.visibility = 0, "visible"
        runs = []
        for name in ("truth", "floor", "engine"):
            self.progress.description = name
            runs.append(self._run(name, prompt, dtype, fault))
            self.progress.value += 1
            yield
        (truth,), floor, (candidate,) = runs
        comparison = compare(truth, candidate, floor=floor)
        chart = to_png(error_by_layer(comparison))
        yield
        where = to_png(ratio_map(comparison, self.model.tokens(prompt.input_ids), prompt.embedding_ranges))
        yield  # verdict and pictures change together: none of them may be of another run
        self.comparison, self.chart.value, self.map.value = comparison, chart, where
        clean = comparison.verdict != "bug"
        self.status.value = parts.note("good" if clean else "bad", f"<b>{escape(str(comparison))}</b>")
        rows = [
            [str(row["tap"]), f"{row['error']:.1e}", f"{row['floor']:.1e}", f"{row['ratio']:.3g}"]
            for row in comparison.table()
        ]
        self.details.value = parts.table(
            ["tap", "largest error", "noise floor", "in noise floors"], rows, "The picture as a table"
        )
        self.progress.layout.visibility = "hidden"

    def _run(self, name: str, prompt: Prompt, dtype: str, fault: str) -> list[Trace]:
        """The truth, the noise floor or the engine's run; those already made are kept, as a fault changes only the last."""
        key = (name, "" if name == "truth" else dtype, prompt.digest + (fault if name == "engine" else ""))
        if key not in self._traces:
            if len(self._traces) > 12:
                self._traces.pop(next(iter(self._traces)))
            if name == "engine":
                self._traces[key] = [self._engine(dtype, fault).trace(prompt, EVERY_TAP)]
            elif name == "floor":
                self._traces[key] = reference(self.model, dtype).noise_floor(prompt, EVERY_TAP)
            else:
                self._traces[key] = [reference(self.model, "float64").trace(prompt, EVERY_TAP)]
        return self._traces[key]

    def _engine(self, dtype: str, fault: str) -> Engine:
        if dtype not in self._engines:
            self._engines[dtype] = open_engine(self.kind, self.model, dtype=dtype)
        engine = self._engines[dtype]
        return engine if fault == CLEAN else FaultyEngine(engine, FAULTS[fault])

    def _show_error(self, error: Exception) -> None:
        self.progress.layout.visibility = "hidden"
        super()._show_error(error)
