"""A mutant: one fault, where it must show first, and how it is planted; the table of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...engines.api import Engine
from ...engines.numba_engine.engine import NumbaEngine
from ...prompt import Prompt, Span
from ..divergence import FirstDivergence, first_divergence
from ..faults import FaultyEngine

Plant = Callable[[NumbaEngine], Engine]


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        what: the fault in words.
        tap: where it must show first.
        plant: turns a fresh engine into the faulty one.
        needs: what the model must have: "" (any), "softcap", "window", "head norms", "bias", "embedding scale".
        both_ways: whether the prompt's second item attends both ways.
        kind: what the explanation must be, where it can be told from one state.
    """

    name: str
    what: str
    tap: str
    plant: Plant
    needs: str = ""
    both_ways: bool = False
    kind: str = ""


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, what: str, tap: str, **more: Any) -> Callable[[Plant], Plant]:
    """Decorator that adds a fault of the engine."""

    def add(plant: Plant) -> Plant:
        MUTANTS[name] = Mutant(name, what, tap, plant, **more)
        return plant

    return add


def of_prompt(name: str, what: str, fault: Callable[[Prompt], Prompt], tap: str = "embed", **more: Any) -> None:
    """Add a fault of what the engine is given."""
    MUTANTS[name] = Mutant(name, what, tap, lambda engine: FaultyEngine(engine, fault), **more)


def judge(mutant: Mutant, engine: NumbaEngine, prompt: Prompt) -> FirstDivergence:
    """Plant the fault in an engine, which is spoiled by it, and look for the first divergence."""
    return first_divergence(mutant.plant(engine), prompt)


def mutant_prompt(ids: Sequence[int], rows: torch.Tensor, both_ways: bool = False) -> Prompt:
    """A prompt that shows all faults: two items of six rows `[12, hidden]`, text before, between and after, over three pages long."""
    if len(ids) < 80:
        raise ValueError(f"{len(ids)} token ids: give at least 80, so that pages and windows matter")
    spans = [Span(grid=(2, 3)), Span(grid=(2, 3), attention="bidirectional" if both_ways else "causal")]
    return Prompt(ids, [rows[:6], rows[6:12]], [(20, 26), (50, 56)], spans)


def outcome(mutant: Mutant, model_name: str, found: FirstDivergence, layers: int) -> dict[str, str]:
    """A row of the table: where it was caught, and whether that is where it was planted."""
    tap = mutant.tap.format(last=layers - 1)
    first = found.divergence
    return {
        "fault": mutant.name,
        "what": mutant.what,
        "model": model_name,
        "caught": "yes" if first is not None else "NO",
        "first divergence": first.tap if first is not None else "",
        "right place": "yes" if first is not None and first.tap == tap else f"NO: {tap}",
        "said to be": found.explanation.kind if found.explanation is not None else "",
    }


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"
