"""The verdict: is an engine the same as the reference, apart by rounding, or wrong, and where first?

Hand-set tolerances are guesses. The reference runs in float64 (the truth) and again in the engine's dtype; the second run's
distance from the truth is the noise floor, the error that honest arithmetic in that dtype makes on this very prompt. An engine
is judged by the ratio of its own error to that floor. One run in the dtype is one throw of the dice: where a state is
ill-conditioned it can come out ten times too good, so the floor is the worst of several (`TransformersReference.noise_floor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import TraceError
from ..trace import Trace
from .metrics import relative_error, unit_roundoff

FACTOR = 8.0
"""An engine's error may be this many noise floors.

Measured with `clean_runs` (seed 3, 8 to 100 tokens) on SmolLM2-135M, 70 runs each in float32, bfloat16 and float16 on a CPU:
the largest ratio of a run has median 1.9; it exceeded 8 in one of the 210 runs (8.5, float16)."""


@dataclass(frozen=True)
class Divergence:
    """The first place where an engine's error exceeds what rounding explains.

    Attributes:
        tap: name of the tap; taps are compared in the order they are computed.
        token: prompt position.
        span: index of the embedding range that holds the token, or None.
        error, floor: relative errors against float64, of the engine and of the noise floor there.
    """

    tap: str
    token: int
    span: int | None
    error: float
    floor: float

    def __str__(self) -> str:
        where = f"tap {self.tap}, token {self.token}" + (f", span {self.span}" if self.span is not None else "")
        return f"{where}: error {self.error:.1e}, {self.error / self.floor:.3g} noise floors ({self.floor:.1e})"


@dataclass(frozen=True)
class Comparison:
    """Errors of an engine and their noise floor, tap by tap, token by token.

    Attributes:
        taps: names, in the order they are computed.
        positions: int64 `[positions]`, prompt positions.
        errors, floors: float64 `[taps, positions]`, relative errors against the truth.
        verdict: "same" (bit for bit what the reference computes in that dtype), "noise", or "bug".
    """

    taps: tuple[str, ...]
    positions: torch.Tensor
    errors: torch.Tensor
    floors: torch.Tensor
    verdict: Literal["same", "noise", "bug"]
    first_divergence: Divergence | None
    factor: float
    engine: str
    dtype: str

    @property
    def ratios(self) -> torch.Tensor:
        """`[taps, positions]`: errors in noise floors; above `factor` is more than rounding explains."""
        return self.errors / self.floors

    def table(self) -> list[dict[str, float | str]]:
        """A row a tap: the largest error, its floor, and the largest ratio over all tokens."""
        return [
            {
                "tap": tap,
                "error": float(self.errors[i].max()),
                "floor": float(self.floors[i].max()),
                "ratio": float(self.ratios[i].max()),
            }
            for i, tap in enumerate(self.taps)
        ]

    def __str__(self) -> str:
        if self.first_divergence is not None:
            return f"bug at {self.first_divergence}"
        if self.verdict == "same":
            return f"same: bit for bit what Transformers computes in {self.dtype}"
        worst = float(self.ratios.max())
        return f"noise: at most {worst:.2g} noise floors ({self.factor:g} allowed) over {len(self.taps)} taps"


def compare(
    reference: Trace, candidate: Trace, *, floor: Trace | Sequence[Trace], factor: float = FACTOR
) -> Comparison:
    """Judge `candidate` by its distance from `reference`, in units of what rounding does.

    Args:
        reference: the truth, a float64 trace.
        candidate: the engine's trace.
        floor: the reference's trace in the engine's dtype, or several that differ by rounding, the plain one first.
        factor: how many noise floors an error may be.

    The floor of a token is its own worst error in `floor`, at least the median over the tap's tokens (one token may be lucky) and
    at least the dtype's unit roundoff.

    Raises:
        TraceError: traces of different prompts, models, taps or positions, a reference that is not float64, or a floor in
            another dtype than the candidate's.
    """
    if not 1.0 <= factor < float("inf"):
        raise ValueError(f"factor={factor}: an engine may be off by at least one noise floor; use a finite factor >= 1")
    runs = [floor] if isinstance(floor, Trace) else list(floor)
    _comparable(reference, candidate, runs)
    taps = tuple(tap for tap in reference if tap in candidate)
    dtype = candidate.provenance["dtype"]
    errors = torch.stack([relative_error(candidate[tap], reference[tap]) for tap in taps])
    floors = torch.stack(
        [torch.stack([relative_error(run[tap], reference[tap]) for run in runs]).amax(dim=0) for tap in taps]
    )
    least = floors.nanquantile(0.5, dim=1, keepdim=True).clamp_min(unit_roundoff(dtype))
    floors = torch.maximum(floors, least)
    wrong = ~(errors <= factor * floors)  # a NaN error is wrong, too
    divergence = None
    if wrong.any():
        tap = int(wrong.any(dim=1).nonzero()[0])
        at = int(wrong[tap].nonzero()[0])
        token = int(reference.positions[at])
        divergence = Divergence(
            taps[tap], token, _span(reference, token), float(errors[tap, at]), float(floors[tap, at])
        )
    same = all(torch.equal(candidate[tap], runs[0][tap]) for tap in taps)
    return Comparison(
        taps,
        reference.positions,
        errors,
        floors,
        "bug" if divergence else "same" if same else "noise",
        divergence,
        factor,
        candidate.provenance["engine"],
        dtype,
    )


def _span(trace: Trace, token: int) -> int | None:
    return next((i for i, (start, stop) in enumerate(trace.provenance["ranges"]) if start <= token < stop), None)


def _comparable(reference: Trace, candidate: Trace, floors: Sequence[Trace]) -> None:
    truth = reference.provenance
    if not floors:
        raise TraceError("no noise floor given: record the reference in the candidate's dtype")
    if truth["dtype"] != "float64":
        raise TraceError(f"the reference is a {truth['dtype']} trace: record it with dtype='float64'")
    for floor in floors:
        if floor.provenance["dtype"] != candidate.provenance["dtype"]:
            raise TraceError(
                f"the floor is {floor.provenance['dtype']}, the candidate {candidate.provenance['dtype']}: rounding differs; "
                "record the reference in the candidate's dtype"
            )
    shared = [tap for tap in reference if tap in candidate]
    if not shared:
        raise TraceError(f"reference and candidate share no tap: {list(reference)} and {list(candidate)}")
    for name, other in (("candidate", candidate), *(("floor", floor) for floor in floors)):
        for key, what in (("model", "models"), ("prompt", "prompts")):
            if other.provenance[key] != truth[key]:
                raise TraceError(
                    f"reference and {name} are of different {what} ({truth[key]} and {other.provenance[key]}): their "
                    "difference says nothing"
                )
        if not torch.equal(other.positions, reference.positions):
            raise TraceError(f"reference and {name} keep different positions: trace both with the same ones")
        for tap in shared:
            if tap not in other:
                raise TraceError(f"the {name} lacks tap {tap!r}: trace it with the taps of the candidate")
            if other[tap].shape != reference[tap].shape:
                raise TraceError(
                    f"tap {tap!r} is {tuple(reference[tap].shape)} in the reference, {tuple(other[tap].shape)} in the {name}"
                )
    for name, trace in (("reference", reference), *(("floor", floor) for floor in floors)):
        for tap in shared:
            if not torch.isfinite(trace[tap]).all():
                raise TraceError(f"the {name} holds NaN or infinity at tap {tap!r}: it cannot be a measure")
