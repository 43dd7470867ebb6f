"""Every fault that can be injected, in one table: what it is, where it shows first, and how it is injected."""

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
Change = Callable[[Prompt], Prompt]


@dataclass(frozen=True)
class Fault:
    """A fault that can be injected.

    Attributes:
        name: key in `FAULTS`.
        description: the fault in words.
        kind: "prompt": the engine is given a changed prompt; "engine": it computes something else; "batching": the trace of a
            single run does not show it, `probe` finds it; "invalid prompt": the prompt itself is invalid.
        inject: turns a fresh engine into a faulty one. The engine may be changed in place.
        change: for faults of prompts, the prompt that is computed instead.
        tap: where the first divergence must be; `{last}` is the last layer. Empty if no trace shows the fault.
        needs: what the model must have: "" (any), "softcap", "window", "head norms", "bias", "embedding scale".
        bidirectional: whether the second item of the test prompt attends bidirectionally.
        diagnosis: kind of explanation that `first_divergence` must give; empty if one state does not determine it.
        any_prompt: whether it applies to every prompt with at least one item.
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


def faults_of(*kinds: Kind) -> Iterator[Fault]:
    """The faults of these kinds, in the order of the table."""
    return (fault for fault in FAULTS.values() if fault.kind in kinds)


def engine_fault(name: str, description: str, tap: str, **more: Any) -> Callable[[Inject], Inject]:
    """Decorator: add a fault in what the engine computes."""
    return _adding(name, description, "engine", tap=tap, **more)


def batching_fault(name: str, description: str) -> Callable[[Inject], Inject]:
    """Decorator: add a fault that shows only across several runs or requests."""
    return _adding(name, description, "batching")


def prompt_fault(name: str, description: str, change: Change, tap: str = "embed", **more: Any) -> None:
    """Add a fault in what the engine is given."""
    _add(Fault(name, description, "prompt", lambda engine: FaultyEngine(engine, change), change, tap, **more))


def invalid_prompt(name: str, description: str, change: Change) -> None:
    """Add a fault that makes a prompt with two items invalid."""
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
