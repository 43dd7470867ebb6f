"""Report whether injected faults are found, and at the right tap: one row per fault, as in data/faults.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comparison.divergence import FirstDivergence, first_divergence
from ..engines.numba_engine.engine import NumbaEngine
from ..prompt import Prompt, Span
from .registry import Fault


def find_fault(fault: Fault, engine: NumbaEngine, prompt: Prompt) -> FirstDivergence:
    """Inject a fault into an engine, which must not be used afterwards, and compare it with the reference: the first divergence."""
    return first_divergence(fault.inject(engine), prompt)


def fault_prompt(ids: Sequence[int], rows: torch.Tensor, bidirectional: bool = False) -> Prompt:
    """Return a prompt in which every fault is visible: two items of six rows each, with text before, between and after them.

    Args:
        ids: at least 80 token ids, so that the prompt fills more than two pages of the KV cache.
        rows: `[12, hidden]`, the rows of both items.
        bidirectional: whether the second item attends bidirectionally.

    Raises:
        ValueError: fewer than 80 ids.
    """
    if len(ids) < 80:
        raise ValueError(f"{len(ids)} token ids: give at least 80, so that pages and windows matter")
    spans = [Span(grid=(2, 3)), Span(grid=(2, 3), attention="bidirectional" if bidirectional else "causal")]
    return Prompt(ids, [rows[:6], rows[6:12]], [(20, 26), (50, 56)], spans)


def report_row(fault: Fault, model_name: str, found: FirstDivergence, layers: int) -> dict[str, str]:
    """Return a row of the table, text by column: fault, description, model, found, first divergence, right place, diagnosis.

    Args:
        found: the result of `first_divergence` for an engine or a prompt with this fault.
        layers: number of layers of the model; `{last}` in `fault.tap` is the last one.
    """
    tap = fault.tap.format(last=layers - 1)
    first = found.divergence
    return {
        "fault": fault.name,
        "description": fault.description,
        "model": model_name,
        "found": "yes" if first is not None else "NO",
        "first divergence": first.tap if first is not None else "",
        "right place": "yes" if first is not None and first.tap == tap else f"NO: {tap}",
        "diagnosis": found.explanation.kind if found.explanation is not None else "",
    }


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """Format rows (at least one) as a Markdown table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"
