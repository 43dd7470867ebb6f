"""What the reference computes for a verdict: which prompt it runs, which states are kept, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from ..engines.base import Sink
from ..engines.transformers.reference import TransformersReference
from ..prompt import Prompt
from ..trace import Trace
from ..trace.provenance import provenance_of
from ..trace.trace import TracePlan


@dataclass(frozen=True)
class ReferencePass:
    """One prompt and the states of it that are wanted.

    Attributes:
        prompt: what is run.
        taps: names or patterns. Names that the reference does not have are left out: of some classes it does not know what attention
            and MLP add.
        positions: the prompt positions to keep.
        states: another engine's trace: each layer runs on its states (`TransformersReference.run_local`); `taps` and `positions` are
            the trace's then. None: a run of the prompt.
        path: file for the float64 trace; None: it is kept in memory.
        max_bytes: limit of that trace's size; None: half of the free memory, or of the free disk space.
    """

    prompt: Prompt
    taps: Sequence[str] = ()
    positions: slice | Sequence[int] = field(default_factory=lambda: slice(None))
    states: Trace | None = None
    path: Path | None = None
    max_bytes: int | None = None

    def plan(self, engine: TransformersReference) -> TracePlan:
        """The shapes of the states.

        Raises:
            EmbeddingRangeError, PromptError: the reference cannot run the prompt.
            TraceError: the states are too large, or `states` lacks some.
        """
        engine.check(self.prompt)
        if self.states is not None:
            taps: Sequence[str] = engine.local_taps(self.prompt, self.states)
            return engine.plan_trace(self.prompt, taps)
        taps = [tap for tap in self.taps if "*" in tap or tap in engine.capabilities.taps] or self.taps
        plan = engine.plan_trace(self.prompt, taps, self.positions)
        if self.max_bytes is not None:
            plan.check_room(self.max_bytes, "into max_bytes", "")
        elif self.path is None:
            plan.check_room(psutil.virtual_memory().available // 2, "into half of the free memory", "")
        return plan

    def run(self, engine: TransformersReference, plan: TracePlan, seed: int, sink: Sink) -> None:
        """Run it once; states go to `sink`.

        Args:
            seed: 0 for an unperturbed run (`TransformersReference.noise_floor`).
        """
        if self.states is not None:
            engine.run_local(self.prompt, self.states, seed, sink)
        else:
            engine.run_seed(self.prompt, list(plan.shapes), plan.positions, seed, sink)

    def provenance(self, engine: TransformersReference) -> dict[str, Any]:
        """The provenance of a run."""
        return provenance_of(
            self.prompt,
            engine=engine.capabilities.name,
            model=engine.model,
            dtype=engine.dtype,
            device=engine.device,
            words=self.path is not None,
        )


class RunningTrace:
    """A float64 run that goes on: states are kept as they come, and by their taps' names found."""

    def __init__(self, plan: TracePlan, provenance: dict[str, Any]) -> None:
        self.plan, self.positions, self.provenance = plan, plan.positions, provenance
        self.states: Any = {}  # by tap; a trace in a file when the run has ended

    def __getitem__(self, tap: str) -> torch.Tensor:
        return self.states[tap]

    def __iter__(self) -> Any:
        return iter(self.plan.shapes)

    def trace(self) -> Trace:
        """The trace of the run that has ended."""
        if isinstance(self.states, Trace):
            return self.states
        return Trace({tap: self.states[tap] for tap in self.plan.shapes}, self.positions, self.provenance)
