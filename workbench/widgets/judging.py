"""Compare an engine with the reference and show the verdict, within a limit of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..comparison import Comparison
from ..comparison.check import check_with_traces
from ..comparison.memory_plan import plan_memory
from ..engines.base import Engine
from ..progress import Progress
from ..prompt import Prompt
from .comparison_view import ComparisonView, NextTokens

_BYTES = 2 << 30
"""States that a verdict may keep in memory; beyond that it leaves taps out, and says so."""


def judge(
    view: ComparisonView, engine: Engine, prompt: Prompt, tokens: Sequence[str], findings: int, progress: Progress
) -> Iterator[None]:
    """Compare the engine with the reference, which runs in float64 and four times in the engine's dtype, and show the verdict in `view`.

    Args:
        tokens: the texts of the prompt's tokens.
        findings: how many findings lint has about the prompt.
        progress: for the comparison; an exception that it raises stops it.
    """
    plan = plan_memory(engine, prompt, _BYTES)
    cost = f" ({plan.nbytes / 1e9:.1f} GB of states)" if plan.nbytes > _BYTES else ""
    view.say("plain", f"comparing with Transformers …{cost}")
    comparison, expected, run = check_with_traces(engine, prompt, progress=progress, taps=plan.taps)
    yield
    names = {"Transformers, float64": expected, f"{engine.capabilities.name}, {comparison.dtype}": run}
    view.show(comparison, prompt, tokens, NextTokens.of_traces(engine.model, names))
    if findings and not comparison.failed:
        view.add_note(
            f"The engine computes this prompt right; lint has {findings} finding{'s' * (findings > 1)} about the prompt itself."
        )
    if plan.left_out:
        view.add_note(
            f"Not compared: {_families(plan.left_out)}, which would take {plan.whole / 1e9:.1f} GB in all; "
            "workbench.check_engine(engine, prompt) compares every tap."
        )


def shared_rows(comparison: Comparison, taps: Sequence[str]) -> bool:
    """Whether a comparison has errors for a map of these taps."""
    return not set(comparison.taps).isdisjoint(taps)


def _families(taps: Sequence[str]) -> str:
    """Names of taps in short: those that differ only in the layer once, as `layers.*.mlp`."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+", ".*", tap) for tap in taps))
