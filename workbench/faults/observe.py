"""Compare what an engine does with an invalid prompt with what the rules for it (`linting.targets`) predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..comparison.reference_cache import reference_run
from ..comparison.verdict import compare
from ..engines.base import Engine
from ..errors import EngineDied, ModelError
from ..linting.targets import Target, effect
from ..prompt import Prompt
from ..trace import Trace
from .registry import Fault


@dataclass(frozen=True)
class Observation:
    """The outcome of one invalid prompt.

    Attributes:
        fault: name of the fault; "none" for the valid prompt.
        predicted: the outcome by the rules: "accepts", "differs", "ignores", "rejects" (see `Effect`), or "undefined".
        why: the reasons by the rules.
        seen: "computes what was predicted", "rejects", "computes something else", "no finite numbers", "crashes".
        evidence: the error, or the verdict of the comparison with the reference on the prompt that the rules predict.
        agrees: whether the prediction was right; None if it was "undefined".
    """

    fault: str
    predicted: str
    why: str
    seen: str
    evidence: str
    agrees: bool | None


def observe(
    engine: Engine, prompt: Prompt, target: str, fault: Fault | None = None, device: str = "cpu"
) -> Observation:
    """Run an invalid prompt on an engine without checks, and compare the outcome with the rules of the target.

    Args:
        engine: opened with `check=False`; in a separate process if a crash must not end this one.
        prompt: a valid prompt with two items.
        target: the engine and version whose rules predict the outcome.
        fault: an "invalid prompt" of `FAULTS`; None leaves the prompt valid.
        device: where the reference runs.
    """
    name = fault.name if fault is not None else "none"
    wrong = fault.change(prompt) if fault is not None and fault.change is not None else prompt
    predicted = effect(wrong, Target.parse(target), engine.model)
    outcome = predicted.outcome if predicted.prompt is not None or predicted.outcome == "rejects" else "undefined"
    why = "; ".join(predicted.notes)
    try:
        trace = engine.trace(wrong, ["norm"])
    except EngineDied as error:
        return Observation(name, outcome, why, "crashes", str(error), None if outcome == "undefined" else False)
    except (ModelError, ValueError, TypeError) as error:
        status = predicted.status.rsplit(".", 1)[-1]
        same_status = not status.isupper() or status in str(error)
        agrees = None if outcome == "undefined" else outcome == "rejects" and same_status
        return Observation(name, outcome, why, "rejects", str(error), agrees)
    if not torch.isfinite(trace["norm"]).all():
        agrees = None if outcome == "undefined" else name == "NaN"
        return Observation(name, outcome, why, "no finite numbers", "states contain NaN or infinity", agrees)
    if predicted.prompt is None:
        return Observation(
            name,
            outcome,
            why,
            "computes something else",
            "finished without an error",
            None if outcome == "undefined" else False,
        )
    dtype = str(engine.dtype).removeprefix("torch.")
    expected, floor = reference_run(engine.model, predicted.prompt, dtype, ["norm"], device=device)
    same_prompt = {key: expected.provenance[key] for key in ("prompt", "ranges", "modalities")}
    seen = compare(expected, Trace(trace, trace.positions, {**trace.provenance, **same_prompt}), floor=floor)
    good = not seen.failed
    words = "computes what was predicted" if good else "computes something else"
    return Observation(name, outcome, why, words, str(seen), good)
