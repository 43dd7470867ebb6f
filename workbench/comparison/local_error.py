"""Local errors: what each layer adds to an engine's error, apart from what it inherits from the layers before it.

The reference runs each layer on the states that the engine had before that layer. A layer that computes correctly differs there by its
own rounding only, however wrong its input is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.base import Engine
from ..engines.freed_memory import return_freed_memory
from ..progress import Progress, part
from ..prompt import Prompt
from ..trace import Trace
from .check import check_with_traces
from .doubt import compare_with_doubt
from .floor_runs import reference_runs
from .noise_floor import NoiseFloor
from .reference_cache import reference_pair
from .reference_pass import ReferencePass
from .verdict import FACTOR, Comparison


@dataclass(frozen=True)
class LocalError:
    """An engine's errors at each tap, as they accumulate from layer to layer, and those that each layer adds.

    Attributes:
        accumulated: the comparison with the reference's run of the prompt (`check_engine`).
        local: the comparison with the reference's layers, each run on the engine's own input to that layer.
    """

    accumulated: Comparison
    local: Comparison

    @property
    def origin(self) -> str | None:
        """The first tap that adds more than rounding to the engine's error; None if none does."""
        found = self.local.first_divergence
        return None if found is None else found.tap

    def table(self) -> list[dict[str, float | str]]:
        """One row per tap: the largest error and multiple of the noise floor over all tokens, accumulated and local, and what follows.

        `outcome` is "right", "adds" (the tap's local error is more than rounding) or "inherits" (only its accumulated error is).
        """
        rows: list[dict[str, float | str]] = []
        for tap in self.local.taps:
            whole, own = self.accumulated.taps.index(tap), self.local.taps.index(tap)
            adds, wrong = bool(self.local.wrong[own].any()), bool(self.accumulated.wrong[whole].any())
            rows.append(
                {
                    "tap": tap,
                    "accumulated": float(self.accumulated.errors[whole].max()),
                    "accumulated_ratio": float(self.accumulated.ratios[whole].max()),
                    "local": float(self.local.errors[own].max()),
                    "local_ratio": float(self.local.ratios[own].max()),
                    "outcome": "adds" if adds else "inherits" if wrong else "right",
                }
            )
        return rows

    def __str__(self) -> str:
        if self.origin is None:
            if self.accumulated.failed:
                return (
                    f"no layer adds more than rounding, but {self.accumulated.first_divergence} accumulated: rounding that grows from layer "
                    "to layer more than the floor's runs show"
                )
            return "no layer adds more than rounding"
        inherited = [row["tap"] for row in self.table() if row["outcome"] == "inherits"]
        after = f"; {len(inherited)} later taps only inherit it" if inherited else ""
        drowned = "" if self.accumulated.failed else "; it drowns in the accumulated noise"
        return f"the fault is added at {self.local.first_divergence}, on the engine's own input{after}{drowned}"


def local_error(
    engine: Engine,
    prompt: Prompt,
    *,
    factor: float = FACTOR,
    device: str = "cpu",
    progress: Progress | None = None,
    streamed: bool | None = None,
) -> LocalError:
    """Run engine and reference on a prompt, and then the reference's layers on the engine's states.

    Args:
        factor: largest error that counts as rounding noise, as a multiple of the noise floor (accumulated and local).
        device: the reference's device, "cpu" or "cuda".
        progress: called with the fraction done; an exception that it raises stops the run.
        streamed: whether the reference's weights are streamed (`check_engine`).

    Raises:
        EmbeddingRangeError, PromptError: the engine cannot run the prompt.
        TraceError: the engine does not expose the states before every layer, or they do not fit into memory.
    """
    first, second = part(progress, 0.0, 0.5), part(progress, 0.5, 1.0)
    accumulated, _, run = check_with_traces(engine, prompt, first, factor=factor, device=device, streamed=streamed)
    return LocalError(accumulated, compare_local(engine, prompt, run, factor, device, second, streamed)[0])


def compare_local(
    engine: Engine,
    prompt: Prompt,
    run: Trace,
    factor: float,
    device: str,
    progress: Progress | None = None,
    streamed: bool | None = None,
) -> tuple[Comparison, Trace]:
    """Compare an engine's trace `run` with the reference's layers on its states; return the comparison and the reference's trace.

    The floor is the largest error of four runs of those layers in the engine's dtype, all but one of them on states that are moved by up
    to one rounding; of sixteen runs if a verdict "bug" would be doubtful (`doubt.py`).

    Raises:
        TraceError: `run` lacks the states before a layer.
    """
    dtype = str(engine.dtype).removeprefix("torch.")
    return_freed_memory(collect=False)
    exact, rounded = reference_pair(engine.model, dtype, device, streamed)
    what = [ReferencePass(prompt, states=run)]
    (found,) = reference_runs(exact, rounded, what, progress=progress)

    def more(runs: int) -> NoiseFloor:
        known = [(found.trace, found.routers)]
        return reference_runs(exact, rounded, what, known, part(progress, 1.0, 1.0), floor_runs=runs)[0].floor

    return compare_with_doubt(found.trace, run, found.floor, factor, more), found.trace
