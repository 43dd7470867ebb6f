"""The verdict: whether an engine equals the reference, differs from it by rounding, or is wrong, and at which state first.

Hand-set tolerances are guesses. Instead, the reference runs in float64 and again in the engine's dtype; the error of the second
run is the noise floor: the rounding error of correct arithmetic in that dtype on this prompt. An engine is judged by the ratio of
its own error to that floor. The error of a single run is partly chance: at an ill-conditioned state it can be ten times smaller
than usual. The floor is therefore the largest error of several runs (`TransformersReference.noise_floor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import TraceError
from ..prompt import Range
from ..trace import Trace
from ..trace.files import readable
from .drift import Drift, find_drift
from .dtype_guess import guess_dtype
from .expert_choices import ExpertChoice
from .metrics import RowSums, row_sums, unit_roundoff
from .noise_floor import NoiseFloor, check_comparable, check_shape, state_digest

FACTOR = 8.0
"""An error of up to 8 times the noise floor counts as noise.

Measured on clean runs of the Numba engine in float32, bfloat16 and float16 (data/bench/README.md, "False alarms"): the largest ratio of a run has
a median of 1.5 to 2.7 and a maximum of 6.6. (With one long sum per dot product, before the engine added up 64 terms at a time, one run of
210 exceeded 8.)"""
CALIBRATED = (8, 16384)
"""The lengths of prompts, in tokens, for which `FACTOR` was measured; above 2,048 mostly on a random model with 40 layers."""


@dataclass(frozen=True)
class Divergence:
    """The first tap and token at which an engine's error exceeds what rounding explains.

    Attributes:
        tap: name of the tap; taps are compared in the order they are computed.
        token: prompt position.
        span: index of the embedding range that contains the token, or None.
        error, floor: at this tap and token, the engine's relative error against the float64 reference, and the noise floor.
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
    """The errors of an engine and the noise floor, for each tap (named hidden state) and token, and the verdict.

    Attributes:
        taps: names, in the order they are computed.
        positions: int64 `[positions]`, prompt positions.
        errors, floors: float64 `[taps, positions]`, relative errors (2-norm) against the reference.
        max_abs, mean_abs, cosine: float64 `[taps, positions]`, other metrics of the same states.
        spans: int64 `[positions]`, the range that contains each position, -1 for text.
        kinds: what each range contains ("image", "audio", ...), if the prompt specifies it.
        verdict: "same" (bit-identical to the reference in that dtype), "noise" (all errors within rounding), "drift" (errors above it that
            grow slowly and smoothly with the position) or "bug".
        first_divergence: the first tap and token whose error exceeds rounding; None if there is none.
        factor: largest error that counted as noise, as a multiple of the noise floor.
        engine, dtype: the engine's name and dtype.
        expert_choices: tokens of a mixture of experts at which rounding decides which expert runs; there either counts as right.
        drift: what the verdict "drift" found; else None.
    """

    taps: tuple[str, ...]
    positions: torch.Tensor
    errors: torch.Tensor
    floors: torch.Tensor
    max_abs: torch.Tensor
    mean_abs: torch.Tensor
    cosine: torch.Tensor
    spans: torch.Tensor
    kinds: tuple[str, ...]
    verdict: Literal["same", "noise", "drift", "bug"]
    first_divergence: Divergence | None
    factor: float
    engine: str
    dtype: str
    expert_choices: tuple[ExpertChoice, ...] = ()
    drift: Drift | None = None

    @property
    def failed(self) -> bool:
        """Whether an error is more than rounding explains: the verdict is "drift" or "bug"."""
        return self.first_divergence is not None

    @property
    def ratios(self) -> torch.Tensor:
        """`[taps, positions]`: errors as multiples of the noise floor; a ratio above `factor` is more than rounding explains."""
        return self.errors / self.floors

    @property
    def wrong(self) -> torch.Tensor:
        """`[taps, positions]`: whether the error is more than rounding explains; a NaN error counts as wrong."""
        return ~(self.errors <= self.factor * self.floors)

    @property
    def failing(self) -> list[int]:
        """Indices into `positions` at which any tap is wrong."""
        return self.wrong.any(dim=0).nonzero().flatten().tolist()

    def table(self) -> list[dict[str, float | str]]:
        """One row per tap: over all tokens the largest error, floor, ratio, max_abs and mean_abs, and the smallest cosine."""
        return [
            {
                "tap": tap,
                "error": float(self.errors[i].max()),
                "floor": float(self.floors[i].max()),
                "ratio": float(self.ratios[i].max()),
                "max_abs": float(self.max_abs[i].max()),
                "mean_abs": float(self.mean_abs[i].max()),
                "cosine": float(self.cosine[i].min()),
            }
            for i, tap in enumerate(self.taps)
        ]

    def columns(self, ranges: Sequence[Range]) -> list[Range]:
        """Convert ranges of prompt positions to ranges of indices into `positions`; a range without kept positions is left out."""
        inside = [((self.positions >= start) & (self.positions < stop)).nonzero().flatten() for start, stop in ranges]
        return [(int(at[0]), int(at[-1]) + 1) for at in inside if len(at)]

    def by_span(self) -> list[dict[str, float | str | int | None]]:
        """One row for the text and one per range: tokens, the largest ratio with its tap and token, and the first wrong tap."""
        rows: list[dict[str, float | str | int | None]] = []
        for span in sorted(set(self.spans.tolist())):
            inside = self.spans == span
            ratios = self.ratios[:, inside]
            flat = int(torch.where(torch.isnan(ratios), torch.inf, ratios).argmax())
            tap, at = divmod(flat, int(inside.sum()))
            bad = self.wrong[:, inside].any(dim=1).nonzero().flatten().tolist()
            rows.append(
                {
                    "span": None if span < 0 else span,
                    "kind": "text" if span < 0 else self.kinds[span] if span < len(self.kinds) else "embeddings",
                    "tokens": int(inside.sum()),
                    "ratio": float(ratios.reshape(-1)[flat]),
                    "tap": self.taps[tap],
                    "token": int(self.positions[inside][at]),
                    "first_wrong": self.taps[bad[0]] if bad else None,
                }
            )
        return rows

    @property
    def looks_like(self) -> str | None:
        """The dtype, or the two, whose rounding the errors have, if it is another than the declared one (`dtype_guess`)."""
        return guess_dtype(self.ratios, self.taps, self.dtype)

    def __str__(self) -> str:
        other = self.looks_like
        if other is not None:
            return f"{self._with_choices()}; at every tap the errors have the size of rounding to {other}: was that meant, not {self.dtype}?"
        return self._with_choices()

    def _with_choices(self) -> str:
        if self.expert_choices and self.verdict != "same":
            closest = min(self.expert_choices, key=lambda choice: choice.margin)
            more = f", and {len(self.expert_choices) - 1} more" if len(self.expert_choices) > 1 else ""
            return f"{self._judgement()}; by rounding alone {closest}{more}"
        return self._judgement()

    def _judgement(self) -> str:
        if self.drift is not None:
            return f"drift: {self.drift}"
        if self.first_divergence is not None:
            return f"bug at {self.first_divergence}"
        if self.verdict == "same":
            return f"same: bit for bit what Transformers computes in {self.dtype}"
        worst = float(self.ratios.max())
        return (
            f"noise: at most {worst:.2g} noise floors ({self.factor:g} allowed, calibrated for {CALIBRATED[0]:,} to {CALIBRATED[1]:,} tokens) "
            f"over {len(self.taps)} taps"
        )


def compare(
    reference: Trace, candidate: Trace, *, floor: NoiseFloor | Trace | Sequence[Trace], factor: float = FACTOR
) -> Comparison:
    """Judge an engine's trace, `candidate`, by its relative error against `reference`, compared with the noise floor.

    All taps that both traces have are compared. Traces on disk are read tap by tap.

    Args:
        reference: the reference's float64 trace.
        candidate: the engine's trace.
        floor: the noise floor, or the reference's traces in the engine's dtype to measure it from: one, or several that differ by
            rounding, the unperturbed one first.
        factor: largest error that counts as noise, as a multiple of the noise floor.

    The floor of a token is its own largest error in `floor`, but at least the median over the tap's tokens (a token's error may be
    small by chance) and at least the dtype's unit roundoff.

    Raises:
        TraceError: traces of different prompts, models, taps or positions, a reference that is not float64, a floor in another
            dtype than the candidate's, or a damaged file.
        ValueError: a factor below 1, or not finite.
    """
    if not 1.0 <= factor < float("inf"):
        raise ValueError(f"factor={factor}: errors of one noise floor are always allowed; use a finite factor >= 1")
    check_comparable(reference, candidate, "candidate")
    taps = tuple(tap for tap in reference if tap in candidate)
    if not taps:
        raise TraceError(
            f"reference and candidate share no tap: {readable(list(reference))} and {readable(list(candidate))}"
        )
    if not isinstance(floor, NoiseFloor):
        floor = NoiseFloor.measure(reference, floor, taps)
    check_comparable(reference, floor, "floor")
    dtype = candidate.provenance["dtype"]
    if floor.provenance["dtype"] != dtype:
        raise TraceError(
            f"the floor is {floor.provenance['dtype']}, the candidate {dtype}: rounding differs; "
            "record the reference in the candidate's dtype"
        )
    for tap in taps:
        if tap not in floor.errors:
            raise TraceError(f"the floor lacks tap {tap!r}: trace it with the taps of the candidate")
    sums = _all_sums(reference, candidate, taps)
    errors = torch.stack([each.relative for each in sums])
    floors = torch.stack([floor.errors[tap] for tap in taps])
    typical = torch.tensor([floor.typical[tap] for tap in taps], dtype=torch.float64)[:, None]
    lowest = typical.clamp_min(unit_roundoff(dtype))
    floors = torch.maximum(floors, lowest)
    wrong = ~(errors <= factor * floors)  # NaN errors are wrong too
    divergence = None
    spans = reference.spans
    if wrong.any():
        depth = int(wrong.any(dim=1).nonzero()[0])
        at = int(wrong[depth].nonzero()[0])
        span = int(spans[at])
        divergence = Divergence(
            taps[depth],
            int(reference.positions[at]),
            None if span < 0 else span,
            float(errors[depth, at]),
            float(floors[depth, at]),
        )
    in_order = bool((reference.positions.diff() > 0).all())
    drift = find_drift(errors / floors, wrong, taps, factor) if divergence is not None and in_order else None
    same = divergence is None and all(state_digest(candidate[tap]) == floor.digests[tap] for tap in taps)
    return Comparison(
        taps,
        reference.positions,
        errors,
        floors,
        torch.stack([each.max_abs for each in sums]),
        torch.stack([each.mean_abs for each in sums]),
        torch.stack([each.cosine for each in sums]),
        spans,
        tuple(reference.provenance["modalities"]),
        "drift" if drift else "bug" if divergence else "same" if same else "noise",
        divergence,
        factor,
        candidate.provenance["engine"],
        dtype,
        floor.expert_choices,
        drift,
    )


def _all_sums(reference: Trace, candidate: Trace, taps: Sequence[str]) -> list[RowSums]:
    """Compute the row sums of every tap, two taps at a time: one is read while the other is summed."""

    def one(tap: str) -> RowSums:
        expected, state = reference[tap], candidate[tap]
        check_shape(tap, expected, state, "candidate")
        sums = row_sums(state, expected)
        if not torch.isfinite(sums.reference).all():
            raise TraceError(f"the reference contains NaN or infinity at tap {tap!r}: no error can be measured")
        return sums

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, taps))
