"""The first divergence: the layer, part, token and span where an engine first differs from the reference, and a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..engines.base import Engine
from ..engines.function_engine import require_engine
from ..prompt import Prompt
from ..trace import Trace
from ..trace.taps import EVERY_TAP
from .check import shared_taps
from .diagnosis import Explanation, explain
from .doubt import compare_with_doubt
from .local_error import compare_local
from .noise_floor import NoiseFloor
from .reference_cache import reference_run
from .reference_work import FLOOR_RUNS
from .verdict import FACTOR, Comparison, Divergence

ROOM = 1 << 30
"""Bytes of memory for traces; if the traces of all taps need more, the first wrong layer is found by bisection."""


@dataclass(frozen=True)
class FirstDivergence:
    """The first hidden state and token at which an engine's error exceeds rounding, and a diagnosis.

    Attributes:
        divergence: tap, token, span, error and noise floor; None if all errors are within rounding.
        last_good: the last tap before it that was compared; without a divergence, the last tap; None if the first one is wrong.
        explanation: the diagnosis; None without a divergence.
        comparison: the comparison of the taps that were traced last.
        runs: number of runs of the engine.
        local: the comparison of what each layer does to the engine's own input (`local_error`); None if it was not made: the engine
            does not expose every layer, or the traces did not fit.
    """

    divergence: Divergence | None
    last_good: str | None
    explanation: Explanation | None
    comparison: Comparison
    runs: int
    local: Comparison | None = None

    def __str__(self) -> str:
        if self.divergence is None:
            return f"no divergence: {self.comparison}"
        if self.comparison.drift is not None and self.divergence == self.comparison.first_divergence:
            return f"{self.comparison}{self._origin()}"
        before = f"{self.last_good} is right; " if self.last_good else ""
        return f"diverges first at {self.divergence}\n{before}{self.explanation}{self._origin()}"

    def _origin(self) -> str:
        """Whether the layer at the divergence adds the fault or inherits it."""
        if self.local is None:
            return ""
        found = self.local.first_divergence
        if found is None:
            return "\non the engine's own input no layer is wrong: rounding grows from layer to layer more than the floor's runs show"
        if self.comparison.failed:
            return ""
        return "\nmeasured on the engine's own input to each layer; in the accumulated rounding of all layers the fault drowns"


def first_divergence(
    engine: Engine,
    prompt: Prompt,
    *,
    factor: float = FACTOR,
    max_bytes: int = ROOM,
    device: str = "cpu",
    streamed: bool | None = None,
) -> FirstDivergence:
    """Find the first tap (named hidden state), token and span at which `engine` differs from the reference by more than rounding.

    If the traces of all taps fit into `max_bytes`, one run finds it, and the reference's layers are also run on the engine's own states
    (`local_error`): the first layer that adds more than rounding is the first divergence, even if its fault drowns in the rounding of
    the layers before it. Otherwise the layers are bisected, one tap per run, and then
    attention and MLP of the layer found are compared. Bisection assumes that a wrong state stays wrong in all later layers; an error
    that becomes smaller than the noise of later layers is found only by a run over all taps. Engines that do not expose layers are
    bisected by the taps `depth.k` if they have them.

    Args:
        factor: largest error that counts as rounding noise, as a multiple of the noise floor.
        max_bytes: memory for the traces of engine and reference.
        device: the reference's device, "cpu" or "cuda".
        streamed: whether the reference's weights are streamed (`check_engine`).

    Raises:
        EmbeddingRangeError, PromptError: the engine cannot run the prompt.
    """
    require_engine(engine, "first_divergence")
    taps = shared_taps(engine, [*EVERY_TAP, "depth.*"] if "embed" not in engine.capabilities.taps else EVERY_TAP)
    search = _Search(engine, prompt, factor, device, streamed)
    # In memory: the engine's trace, the reference in float64, and its four runs in the engine's dtype.
    whole = engine.plan_trace(prompt, taps).nbytes * (1 + 8 // engine.dtype.itemsize + 4)
    if whole <= max_bytes:
        return search.result_of_all(taps)
    stream = [tap for tap in taps if tap.count(".") < 2]
    bad = _bisect(stream, lambda tap: search.compare_at([tap]).failed)
    if bad is None:
        return search.result(search.compare_at([stream[-1]]), [stream[-1]])
    before = stream[bad - 1 : bad]
    parts = [tap for tap in taps if tap.startswith(f"{stream[bad]}.")]
    group = [*before, *parts, stream[bad]]
    return search.result(search.compare_at(group), group)


def _bisect(taps: Sequence[str], wrong: Callable[[str], bool]) -> int | None:
    """Index of the first wrong tap, assuming that all taps after it are wrong too; None if the last one is right."""
    if not wrong(taps[-1]):
        return None
    low, high = 0, len(taps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(taps[middle]) else (middle + 1, high)
    return low


def _exposes_layers(engine: Engine) -> bool:
    layers = engine.model.text_config.num_hidden_layers
    return {"embed", *(f"layers.{number}" for number in range(layers))} <= set(engine.capabilities.taps)


class _Search:
    """Runs engine and reference over chosen taps, and keeps the traces of the last comparison for the diagnosis."""

    def __init__(self, engine: Engine, prompt: Prompt, factor: float, device: str, streamed: bool | None) -> None:
        self.engine, self.prompt, self.factor, self.device, self.runs = engine, prompt, factor, device, 0
        self.streamed = streamed

    def compare_at(self, taps: Sequence[str]) -> Comparison:
        dtype = str(self.engine.dtype).removeprefix("torch.")

        def reference(runs: int) -> tuple[Trace, NoiseFloor]:
            model = self.engine.model
            return reference_run(
                model, self.prompt, dtype, taps, device=self.device, streamed=self.streamed, floor_runs=runs
            )

        self.reference, floor = reference(FLOOR_RUNS)
        self.state = self.engine.trace(self.prompt, taps)
        self.runs += 1
        return compare_with_doubt(self.reference, self.state, floor, self.factor, lambda runs: reference(runs)[1])

    def result_of_all(self, taps: Sequence[str]) -> FirstDivergence:
        """The result of a comparison of all taps: of what each layer adds, if the engine exposes the states before every layer."""
        comparison = self.compare_at(taps)
        whole = self.result(comparison, taps)
        if comparison.verdict == "same" or not _exposes_layers(self.engine):
            return whole
        local, reference = compare_local(
            self.engine, self.prompt, self.state, self.factor, self.device, streamed=self.streamed
        )
        found = local.first_divergence
        if found is None or (whole.divergence is not None and whole.divergence.tap == found.tap):
            return replace(whole, local=local)
        at = local.taps.index(found.tap)
        explanation = explain(local, reference, self.state, self.prompt, self.engine.model)
        return FirstDivergence(found, local.taps[at - 1] if at else None, explanation, comparison, self.runs, local)

    def result(self, comparison: Comparison, taps: Sequence[str]) -> FirstDivergence:
        found = comparison.first_divergence
        if found is None:
            return FirstDivergence(None, taps[-1], None, comparison, self.runs)
        at = comparison.taps.index(found.tap)
        last_good = comparison.taps[at - 1] if at else None
        explanation = explain(comparison, self.reference, self.state, self.prompt, self.engine.model)
        return FirstDivergence(found, last_good, explanation, comparison, self.runs)
