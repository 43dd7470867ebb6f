"""A comparison as one HTML file: verdict, pictures, tables, provenance. It loads nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .compare import Comparison
from .errors import TraceError
from .plots import error_by_layer, ratio_map, to_png
from .trace import Trace

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1120px;margin:2em auto;padding:0 1em}
h1{font-size:1.4em} h2{font-size:1.1em;margin-top:1.8em} img{max-width:100%}
table{border-collapse:collapse;font-size:13px} td,th{padding:2px 12px 2px 0;text-align:left;border-bottom:1px solid #e4e4e0}
.verdict{padding:.6em 1em;border-left:5px solid} .bug{background:#fbe6e8;border-color:#9b1d2f}
.noise,.same{background:#e3f4ec;border-color:#0b6e4f} code{font-size:13px}
"""


def html_report(comparison: Comparison, truth: Trace, candidate: Trace, explanation: str = "") -> str:
    """The page as text."""
    words = candidate.provenance.get("words") or truth.provenance.get("words")
    tokens = words or [str(position) for position in range(candidate.provenance["tokens"])]
    ranges = [(start, stop) for start, stop in candidate.provenance["ranges"]]
    first = comparison.first_divergence
    near = ""
    if first is not None and words:
        around = range(max(first.token - 4, 0), min(first.token + 5, len(words)))
        near = (
            "<p>Around it: "
            + " ".join(
                f"<b><code>{escape(repr(words[i]))}</code></b>"
                if i == first.token
                else f"<code>{escape(repr(words[i]))}</code>"
                for i in around
            )
            + "</p>"
        )
    pictures = [
        (
            "Error by tap",
            error_by_layer(comparison),
            "The largest relative error over all tokens, with what rounding explains as a band.",
        ),
        ("Error by tap and token", ratio_map(comparison, tokens, ranges), "In noise floors; lines mark the ranges."),
    ]
    body = [
        f"<h1>{escape(str(candidate.provenance['engine']))} against Transformers, {escape(str(candidate.provenance['model']))}</h1>",
        f'<p class="verdict {comparison.verdict}">{escape(str(comparison))}</p>',
        f"<p>{escape(explanation)}</p>" if explanation else "",
        near,
        *(
            f"<h2>{title}</h2><p>{text}</p>"
            f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(to_png(figure)).decode()}">'
            for title, figure, text in pictures
        ),
        "<h2>By span</h2>",
        _table(comparison.by_span()),
        "<h2>By tap</h2>",
        _table(comparison.table()),
        "<h2>Where the runs come from</h2>",
        _table(
            [{"run": name, **_plain(trace.provenance)} for name, trace in (("reference", truth), ("engine", candidate))]
        ),
    ]
    title = f"{comparison.verdict}: {candidate.provenance['engine']}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def write_report(
    path: str | Path, comparison: Comparison, truth: Trace, candidate: Trace, explanation: str = ""
) -> None:
    """Write the page to a file.

    Raises:
        TraceError: it cannot be written.
    """
    try:
        Path(path).write_text(html_report(comparison, truth, candidate, explanation), encoding="utf-8")
    except OSError as error:
        raise TraceError(f"the report cannot be written to {path}: {error}") from error


def _plain(provenance: Mapping[str, Any]) -> dict[str, str]:
    record = {key: value for key, value in provenance.items() if key not in ("words", "versions")}
    return {**{key: str(value) for key, value in record.items()}, **provenance["versions"]}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = "" if value is None else str(value)
    return escape(text if len(text) <= 90 else text[:24] + "…")
