"""A comparison as one self-contained HTML file: verdict, figures, tables, provenance."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..atomic_write import atomic_write
from ..comparison import Comparison
from ..errors import TraceError
from ..plots import error_by_layer, ratio_map, to_png
from ..plots.html_table import html_table
from ..trace import Trace

_MAX_CELL = 90  # characters; longer values are digests


def html_report(comparison: Comparison, reference: Trace, candidate: Trace, explanation: str = "") -> str:
    """Return a comparison as the text of an HTML page that needs no other files.

    Args:
        reference, candidate: the traces that were compared.
        explanation: the text of `explain` for the first divergence, or "".
    """
    words = candidate.provenance.get("words") or reference.provenance.get("words")
    tokens = words or [str(position) for position in range(candidate.provenance["tokens"])]
    ranges = [(start, stop) for start, stop in candidate.provenance["ranges"]]
    first = comparison.first_divergence
    nearby: list[tuple[str, bool]] = []
    if first is not None and words:
        around = range(max(first.token - 4, 0), min(first.token + 5, len(words)))
        nearby = [(repr(words[position]), position == first.token) for position in around]
    figures = [
        ("Error by tap", "The largest relative error over all tokens; the band is the rounding error.", error_by_layer(comparison)),
        ("Error by tap and token", "In units of the noise floor; lines mark the ranges.", ratio_map(comparison, tokens, ranges)),
    ]  # fmt: skip
    runs = [
        {"run": name, **_flat(trace.provenance)} for name, trace in (("reference", reference), ("engine", candidate))
    ]
    environment = Environment(
        loader=PackageLoader("workbench.cli", "templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        comparison=comparison,
        engine=candidate.provenance["engine"],
        model=candidate.provenance["model"],
        explanation=explanation,
        nearby=nearby,
        figures=[(title, text, base64.b64encode(to_png(figure)).decode()) for title, text, figure in figures],
        tables=[
            ("By span", _table(comparison.by_span())),
            ("By tap", _table(comparison.table())),
            ("Provenance of the runs", _table(runs)),
        ],
    )


def write_report(
    path: str | Path, comparison: Comparison, reference: Trace, candidate: Trace, explanation: str = ""
) -> None:
    """Write the page of `html_report` to a file, atomically.

    Raises:
        TraceError: the file cannot be written.
    """
    try:
        atomic_write(path, html_report(comparison, reference, candidate, explanation).encode())
    except OSError as error:
        raise TraceError(f"the report cannot be written to {path}: {error}") from error


def _flat(provenance: Mapping[str, Any]) -> dict[str, str]:
    record = {key: value for key, value in provenance.items() if key not in ("words", "versions")}
    return {**{key: str(value) for key, value in record.items()}, **provenance["versions"]}


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    return html_table(names, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = "" if value is None else str(value)
    return text if len(text) <= _MAX_CELL else text[:24] + "…"
