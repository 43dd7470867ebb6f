"""A view of one comparison of an engine with the reference: verdict, error by layer, map and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import ipywidgets as w
import torch

from ..analysis.state_maps import comparison_maps
from ..comparison import Comparison
from ..models import Model
from ..plots.errors import comparison_figure, error_by_layer
from ..plots.figure import Figure
from ..plots.html_table import html_table
from ..prompt import Prompt
from ..trace import Trace
from . import components
from .hidden_state_map import HiddenStateMap
from .key_guard import KeyGuard
from .view import Composite


@dataclass(frozen=True)
class NextTokens:
    """The likeliest next tokens of several runs, by name: `{"engine": [(token, probability), ...]}`, likeliest first."""

    runs: dict[str, list[tuple[str, float]]]

    @classmethod
    def of_traces(cls, model: Model, traces: Mapping[str, Trace], count: int = 5) -> NextTokens | None:
        """Return the `count` likeliest tokens after the last position of each trace; None if one has no logits."""
        if not all("logits" in trace for trace in traces.values()):
            return None
        return cls.of(model, {name: trace["logits"][-1] for name, trace in traces.items()}, count)

    @classmethod
    def of(cls, model: Model, logits: dict[str, torch.Tensor], count: int = 5) -> NextTokens:
        """Return the `count` likeliest tokens by each run's logits `[vocab]` at its last position."""
        runs = {}
        for name, row in logits.items():
            best = row.float().softmax(dim=-1).topk(count)
            runs[name] = list(zip(model.tokens(best.indices.tolist()), best.values.tolist(), strict=True))
        return cls(runs)


class ComparisonView(Composite):
    """A view of the comparison that was last passed to `show`; before the first, it shows "not compared yet".

    `height` is that of the map, in pixels.
    """

    def __init__(self, height: int = 300) -> None:
        self.comparison: Comparison | None = None
        self._tokens: Sequence[str] = ()
        self._prompt: Prompt | None = None
        self._note = ""
        self.banner = w.HTML(components.note("plain", "not compared yet"))
        self.chart = components.FigureImage()
        self.map = HiddenStateMap(metric="error", height=height)
        self.spans, self.words, self.table = w.HTML(), w.HTML(), w.HTML()
        tables = w.HBox([self.spans, self.words], layout={"flex_flow": "row wrap", "grid_gap": "32px"})
        self.view = w.VBox([self.banner, self.chart, self.map, tables, self.table, KeyGuard()])
        self.view.add_class("workbench-view").add_class("workbench-verdict")

    def show(
        self, comparison: Comparison, prompt: Prompt, tokens: Sequence[str], words: NextTokens | None = None
    ) -> None:
        """Show a comparison that was made for `prompt`.

        `tokens` are the texts of the prompt's tokens; `words` adds a table of next tokens.
        """
        self.comparison, self._prompt, self._tokens, self._note = comparison, prompt, tokens, ""
        self.restate()
        self.chart.show(error_by_layer(comparison), f"error by layer compared with the noise floor: {comparison}")
        self.map.show(comparison_maps(comparison, tokens, prompt.embedding_ranges))
        first = comparison.first_divergence
        if first is not None:
            self.map.chosen = [comparison.taps.index(first.tap), comparison.positions.tolist().index(first.token)]
        else:
            self.map.chosen = []
        self.spans.value = _span_table(comparison)
        self.words.value = _word_table(words) if words else ""
        rows = [
            [
                str(row["tap"]),
                f"{row['error']:.1e}",
                f"{row['floor']:.1e}",
                f"{row['ratio']:.3g}",
                f"{row['cosine']:.6f}",
            ]
            for row in comparison.table()
        ]
        self.table.value = html_table(
            ["tap", "largest error", "noise floor", "in noise floors", "lowest cosine"],
            rows,
            "All taps as a table",
            folded=True,
        )

    def restate(self) -> None:
        """Show the verdict of the last comparison again, after `say` has replaced it; RuntimeError if there is none."""
        comparison = self._shown()
        kind = "good" if not comparison.failed else "bad"
        more = f"<br>{self._note}" if self._note else ""
        self.banner.value = components.note(kind, f"<b>{escape(str(comparison))}</b>{more}")

    def add_note(self, message: str) -> None:
        """Show a message (HTML) below the verdict of the last comparison; RuntimeError if there is none."""
        self._shown()
        self._note = f"{self._note}<br>{message}" if self._note else message
        self.restate()

    def say(self, kind: str, message: str) -> None:
        """Show a message (HTML) instead of the verdict; the rest of the last comparison stays.

        `kind`: as in `components.note`.
        """
        self.banner.value = components.note(kind, message)

    def figure(self) -> Figure:
        """Return verdict, error by layer and the map of errors in noise floors as a matplotlib figure.

        Raises:
            RuntimeError: nothing has been compared.
        """
        comparison = self._shown()
        assert self._prompt is not None
        return comparison_figure(comparison, self._tokens, self._prompt.embedding_ranges)

    def _shown(self) -> Comparison:
        if self.comparison is None:
            raise RuntimeError("nothing has been compared yet: call show(), or wait() of the explorer")
        return self.comparison


def _span_table(comparison: Comparison) -> str:
    rows = []
    for row in comparison.by_span():
        name = "text" if row["span"] is None else f"range {row['span']} ({row['kind']})"
        wrong = row["first_wrong"] or "nowhere"
        rows.append([name, str(row["tokens"]), f"{row['ratio']:.3g} at {row['tap']}, token {row['token']}", str(wrong)])
    return html_table(["span", "tokens", "worst error, in noise floors", "first wrong at"], rows, "By span")


def _word_table(words: NextTokens) -> str:
    columns = list(words.runs.values())
    rows = [
        [cell for column in columns for cell in (repr(column[i][0]), f"{column[i][1]:.1%}")]
        for i in range(len(columns[0]))
    ]
    header = [cell for name in words.runs for cell in (name, "")]
    return html_table(header, rows, "Next token")
