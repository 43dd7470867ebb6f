"""The first divergence: layer, part, token and span where an engine leaves the reference, and what changed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engines.api import Engine
from ..models import Model
from ..prompt import Prompt
from ..taps import EVERY_TAP
from ..trace import Trace
from .explain import Explanation, explain_splice, explain_tap
from .run import reference_run, shared_taps
from .verdict import FACTOR, Comparison, Divergence, compare

ROOM = 1 << 30
"""Bytes that traces may take at a time; where all taps together take more, layers are bisected."""


@dataclass(frozen=True)
class FirstDivergence:
    """Where it starts and why.

    Attributes:
        divergence: tap, token, span, error and floor; None where everything is within rounding.
        last_good: the tap before, None where the first one is wrong already.
        explanation: what a wrong state is instead.
        comparison: of the taps that were looked at last.
        runs: how often the engine ran.
    """

    divergence: Divergence | None
    last_good: str | None
    explanation: Explanation | None
    comparison: Comparison
    runs: int

    def __str__(self) -> str:
        if self.divergence is None:
            return f"no divergence: {self.comparison}"
        before = f"{self.last_good} is right; " if self.last_good else ""
        return f"diverges first at {self.divergence}\n{before}{self.explanation}"


def first_divergence(
    engine: Engine, prompt: Prompt, *, factor: float = FACTOR, max_bytes: int = ROOM, device: str = "cpu"
) -> FirstDivergence:
    """Find the first tap, token and span where `engine` is wrong.

    Where all taps fit into `max_bytes` one run finds it. Else the residual stream is bisected, one tap a run, and then the
    parts of the layer found are looked at: that finds faults that stay visible in the residual stream up to its end; one that drowns in
    the noise of later layers is found by one run over all taps only. Engines that show no
    layers are bisected by depth where they have `depth.k`.

    Args:
        device: where the reference runs.
    """
    taps = shared_taps(engine, [*EVERY_TAP, "depth.*"] if "embed" not in engine.capabilities.taps else EVERY_TAP)
    search = _Search(engine, prompt, factor, device)
    # The reference keeps float64, and each of a few runs in the engine's dtype besides.
    whole = engine.plan_trace(prompt, taps).nbytes * (1 + 8 // engine.dtype.itemsize + 4)
    if whole <= max_bytes:
        return search.result(search.look(taps), taps)
    stream = [tap for tap in taps if tap.count(".") < 2]
    bad = _bisect(stream, lambda tap: search.look([tap]).verdict == "bug")
    if bad is None:
        return search.result(search.look([stream[-1]]), [stream[-1]])
    before = stream[bad - 1 : bad]
    parts = [tap for tap in taps if tap.startswith(f"{stream[bad]}.")]
    group = [*before, *parts, stream[bad]]
    return search.result(search.look(group), group)


def _bisect(taps: Sequence[str], wrong: Callable[[str], bool]) -> int | None:
    """Index of the first wrong tap, where all after it are wrong, too; None where the last is right."""
    if not wrong(taps[-1]):
        return None
    low, high = 0, len(taps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(taps[middle]) else (middle + 1, high)
    return low


class _Search:
    """Runs engine and reference over chosen taps, and keeps the states of the last look for the explanation."""

    def __init__(self, engine: Engine, prompt: Prompt, factor: float, device: str) -> None:
        self.engine, self.prompt, self.factor, self.device, self.runs = engine, prompt, factor, device, 0

    def look(self, taps: Sequence[str]) -> Comparison:
        dtype = str(self.engine.dtype).removeprefix("torch.")
        truth, floor = reference_run(self.engine.model, self.prompt, dtype, taps, device=self.device)
        self.truth, self.state = truth, self.engine.trace(self.prompt, taps)
        self.runs += 1
        return compare(truth, self.state, floor=floor, factor=self.factor)

    def result(self, comparison: Comparison, taps: Sequence[str]) -> FirstDivergence:
        found = comparison.first_divergence
        if found is None:
            return FirstDivergence(None, taps[-1], None, comparison, self.runs)
        at = comparison.taps.index(found.tap)
        last_good = comparison.taps[at - 1] if at else None
        explanation = explain(comparison, self.truth, self.state, self.prompt, self.engine.model)
        return FirstDivergence(found, last_good, explanation, comparison, self.runs)


def explain(
    comparison: Comparison, truth: Trace, state: Trace, prompt: Prompt | None = None, model: Model | None = None
) -> Explanation | None:
    """What the first wrong tap of a comparison says about the cause; None where nothing is wrong.

    With prompt and model, rows that stand in the wrong place in hidden state 0 are named.
    """
    found = comparison.first_divergence
    if found is None:
        return None
    at = comparison.taps.index(found.tap)
    wrong, positions = comparison.wrong[at], comparison.positions
    expected, given = truth[found.tap], state[found.tap]
    whole = prompt is not None and len(positions) == len(prompt) and bool(prompt.input_embeddings)
    if found.tap == "embed":
        if not whole or prompt is None or model is None:
            return Explanation(
                "unknown",
                "hidden state 0 is wrong already: the splice. Compare whole prompts, with prompt and model, to see what stands there",
            )
        own = model.token_rows(prompt.lookup_ids if _placeholders_unknown(prompt, model) else prompt.input_ids)
        return explain_splice(prompt, expected, given, wrong, own.to(expected), comparison.dtype)
    before = comparison.taps[at - 1] if at else None
    return explain_tap(found.tap, expected, given, wrong, positions, comparison.spans, before)


def _placeholders_unknown(prompt: Prompt, model: Model) -> bool:
    """Whether some id under a range is no id of the model, so that it has no row of its own."""
    size = len(model.embedding_table)
    return any(not 0 <= token < size for token in prompt.input_ids)
