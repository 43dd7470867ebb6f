"""The table of all faults that can be injected: what each is, at which tap it must be found first, and how it is injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..engines.base import Engine
from ..engines.numba_engine.engine import NumbaEngine
from ..prompt import Prompt
from .faulty_engine import FaultyEngine

Kind = Literal["prompt", "engine", "batching", "invalid prompt"]
Inject = Callable[[NumbaEngine], Engine]
"""Returns a faulty engine, given a new one, which may be changed in place."""
Change = Callable[[Prompt], Prompt]
"""Returns a changed prompt."""


@dataclass(frozen=True)
class Fault:
    """A fault that can be injected.

    Attributes:
        name: key in `FAULTS`.
        description: the fault in words.
        kind: "prompt": the engine gets a changed prompt; "engine": it computes something else; "batching": not visible in the trace
            of a single run, but found by `probe`; "invalid prompt": the prompt becomes invalid.
        inject: returns a faulty engine, given a new one, which may be changed in place and must not be used afterwards.
        change: for the kinds "prompt" and "invalid prompt": returns the prompt that is computed instead.
        tap: the tap (named hidden state) of the first divergence; `{last}` is the last layer. Empty if a trace does not show it.
        needs: what the model must have: "" (any), "softcap", "window", "head norms", "bias", "embedding scale".
        bidirectional: whether the second item of the test prompt must attend bidirectionally.
        diagnosis: the `Explanation.kind` that `first_divergence` must find; empty if the states allow several.
        any_prompt: whether it applies to every prompt with at least one item, not only to the test prompt.
    """

    name: str
    description: str
    kind: Kind
    inject: Inject
    change: Change | None = None
    tap: str = ""
    needs: str = ""
    bidirectional: bool = False
    diagnosis: str = ""
    any_prompt: bool = False


FAULTS: dict[str, Fault] = {}
"""All faults by name; filled by the modules that `workbench.faults` imports."""


def faults_of(*kinds: Kind) -> Iterator[Fault]:
    """The faults of these kinds, in the order of the table."""
    return (fault for fault in FAULTS.values() if fault.kind in kinds)


def engine_fault(name: str, description: str, tap: str, **more: Any) -> Callable[[Inject], Inject]:
    """Decorator for a function that injects a fault into what the engine computes; adds it to `FAULTS`.

    Args:
        tap: the tap at which it must be found first.
        more: other fields of `Fault`, or `min_layers`, the number of layers that the model must have.
    """
    return _adding(name, description, "engine", tap=tap, **more)


def batching_fault(name: str, description: str) -> Callable[[Inject], Inject]:
    """Decorator for a function that injects a fault visible only over several runs or requests; adds it to `FAULTS`."""
    return _adding(name, description, "batching")


def prompt_fault(name: str, description: str, change: Change, tap: str = "embed", **more: Any) -> None:
    """Add to `FAULTS` a fault in the engine's input: it computes `change(prompt)`. `more`: other fields of `Fault`."""
    _add(Fault(name, description, "prompt", lambda engine: FaultyEngine(engine, change), change, tap, **more))


def invalid_prompt(name: str, description: str, change: Change) -> None:
    """Add to `FAULTS` a fault whose `change` takes a valid prompt with two items and returns an invalid one."""
    _add(Fault(name, description, "invalid prompt", lambda engine: FaultyEngine(engine, change), change))


def _adding(name: str, description: str, kind: Kind, min_layers: int = 0, **more: Any) -> Callable[[Inject], Inject]:
    def decorate(inject: Inject) -> Inject:
        def checked(engine: NumbaEngine) -> Engine:
            layers = len(engine.decoder.layers)
            if layers < min_layers:
                raise ValueError(
                    f"the fault {name!r} needs a model of at least {min_layers} layers; this one has {layers}"
                )
            return inject(engine)

        _add(Fault(name, description, kind, checked, **more))
        return inject

    return decorate


def _add(fault: Fault) -> None:
    if fault.name in FAULTS:
        raise ValueError(f"there is already a fault named {fault.name!r}: choose another name")
    FAULTS[fault.name] = fault
