"""The noise floor of a prompt in a dtype: the rounding error of the reference at each tap (named hidden state) and token."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..atomic_write import atomic_write
from ..errors import TraceError, reason
from ..trace import Trace
from ..trace.files import check_metadata, metadata_checksum, raw_bytes
from ..trace.provenance import check_provenance
from .expert_choices import ExpertChoice
from .metrics import relative_error

FORMAT = "workbench-floor-3"
_BEFORE = "workbench-floor-2"
"""Files without expert choices and typical errors; those are the medians of the errors, since no expert was exchanged."""


@dataclass(frozen=True)
class NoiseFloor:
    """The errors of the reference in an engine's dtype, against its own float64 run.

    It takes kilobytes, and replaces the gigabytes of the traces from which it was measured.

    Attributes:
        errors: `{tap: float64 [positions]}`, relative errors (2-norm), the largest of all runs.
        digests: `{tap: SHA-256 of the unperturbed run's states}`, by which an engine that computes exactly the same is recognised.
        positions, provenance: of the unperturbed run, as in `Trace`.
        typical: `{tap: median over the positions}` of the errors of the runs in which no expert was exchanged.
        expert_choices: tokens at which rounding decides which expert runs; the errors include those of the other choice.
    """

    errors: Mapping[str, torch.Tensor]
    digests: Mapping[str, str]
    positions: torch.Tensor
    provenance: Mapping[str, Any]
    typical: Mapping[str, float]
    expert_choices: tuple[ExpertChoice, ...] = ()

    @classmethod
    def measure(cls, reference: Trace, runs: Trace | Sequence[Trace], taps: Sequence[str] | None = None) -> NoiseFloor:
        """Measure the noise floor from the reference's float64 trace and its traces in the engine's dtype.

        Args:
            reference: the float64 trace.
            runs: one trace or several in the engine's dtype, the unperturbed one first (`TransformersReference.noise_floor`).
            taps: the taps to measure; None: all that the first run and the reference share.

        Raises:
            TraceError: no run; runs in different dtypes; a run of another prompt, model or positions than the reference; NaN.
        """
        measurement = FloorMeasurement(reference, taps)
        for run in [runs] if isinstance(runs, Trace) else runs:
            measurement.add(run)
        return measurement.floor()

    def save(self, path: str | Path) -> None:
        """Write the noise floor to one safetensors file.

        Raises:
            TraceError: the file cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "positions": json.dumps(self.positions.tolist()),
            "digests": json.dumps(dict(self.digests)),
            "crc32": json.dumps({tap: f"{zlib.crc32(raw_bytes(error)):08x}" for tap, error in self.errors.items()}),
            "provenance": json.dumps(dict(self.provenance)),
            "typical": json.dumps(dict(self.typical)),
            "expert_choices": json.dumps([asdict(each) for each in self.expert_choices]),
        }
        metadata["checksum"] = metadata_checksum(metadata)
        try:
            # safetensors' save_file makes a file that only its owner can read.
            atomic_write(path, save({tap: error.contiguous() for tap, error in self.errors.items()}, metadata))
        except (SafetensorError, OSError) as error:
            raise TraceError(f"the noise floor cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> NoiseFloor:
        """Read a file written by `save`.

        Raises:
            TraceError: the file is not a noise floor, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (FORMAT, _BEFORE):
                    raise TraceError(
                        f"{path} is not a noise floor of this version ({FORMAT}): record the reference again"
                    )
                check_metadata(metadata, path)
                provenance = check_provenance(json.loads(metadata["provenance"]), path)
                digests, positions = json.loads(metadata["digests"]), json.loads(metadata["positions"])
                sums = json.loads(metadata["crc32"])
                choices = json.loads(metadata.get("expert_choices", "[]"))
                typical = json.loads(metadata.get("typical", "{}"))
                if not all(isinstance(each, dict) for each in (digests, sums, typical)):
                    raise TraceError(f"{path}: its digests, checksums and typical errors are not JSON objects")
                expert_choices = tuple(ExpertChoice.from_json(each) for each in choices)
                errors = {tap: file.get_tensor(tap) for tap in digests}
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(f"{path} cannot be read as a noise floor: {reason(error)}. Record it again") from error
        if not isinstance(positions, list) or not all(type(position) is int for position in positions):
            raise TraceError(f"{path}: its positions are not a list of integers")
        for tap, sizes in errors.items():
            if f"{zlib.crc32(raw_bytes(sizes)):08x}" != sums.get(tap):
                raise TraceError(
                    f"{path}: the floor of tap {tap!r} was damaged or changed: copy it again, or record it again"
                )
            if (
                sizes.shape != (len(positions),)
                or sizes.dtype != torch.float64
                or not ((sizes >= 0) & torch.isfinite(sizes)).all()
            ):
                raise TraceError(f"{path}: the floor of tap {tap!r} is not one finite number >= 0 per position")
        if metadata["format"] == _BEFORE:
            typical = {tap: float(sizes.quantile(0.5)) for tap, sizes in errors.items()}
        if not all(isinstance(typical.get(tap), float) and 0 <= typical[tap] < float("inf") for tap in digests):
            raise TraceError(f"{path}: its typical errors are not one finite number >= 0 per tap")
        return cls(errors, digests, torch.tensor(positions, dtype=torch.int64), provenance, typical, expert_choices)


class Run(Protocol):
    """What a run is of: a trace, a floor, or a run that goes on."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 `[positions]`."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """As in `Trace`."""


class ReferenceStates(Run, Protocol):
    """The states of a float64 run, by tap."""

    def __getitem__(self, tap: str) -> torch.Tensor: ...

    def __iter__(self) -> Iterator[str]: ...


class FloorMeasurement:
    """Measures a noise floor run by run, so that no two runs need memory at once.

    Args:
        reference: the float64 run; its states may come while the runs are made, each before the other runs' state of that tap.
        taps: the taps to measure; None: all that the first run and the reference share.
    """

    def __init__(self, reference: ReferenceStates, taps: Sequence[str] | None = None) -> None:
        self._reference, self._taps = reference, taps
        self._errors: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._typical: dict[str, float] = {}
        self._first: tuple[torch.Tensor, Mapping[str, Any]] | None = None

    def begin(self, run: Run) -> None:
        """Announce a run whose states are then given to `add_state`; the first one must be unperturbed.

        Raises:
            TraceError: it is in another dtype than the first, or of another prompt, model or positions than the reference.
        """
        check_comparable(self._reference, run, "floor")
        if self._first is None:
            self._first = run.positions, run.provenance
        elif run.provenance["dtype"] != self._first[1]["dtype"]:
            dtypes = f"{self._first[1]['dtype']} and {run.provenance['dtype']}"
            raise TraceError(f"runs in {dtypes}: rounding differs; use one dtype")

    def add(self, run: Trace) -> None:
        """Take the errors of a whole run; the first one must be unperturbed.

        Raises:
            TraceError: as for `begin` and `add_state`, or a tap is missing.
        """
        self.begin(run)
        self._taps = [tap for tap in self._reference if tap in run] if self._taps is None else self._taps
        for tap in self._taps:
            if tap not in run:
                raise TraceError(f"the floor lacks tap {tap!r}: trace it with the taps of the candidate")
            self.add_state(tap, run[tap])

    def add_state(self, tap: str, state: torch.Tensor, *, exchanged: bool = False) -> None:
        """Take the error of one state of the run; its reference must be known.

        Args:
            exchanged: whether undecided experts are exchanged in this run: its errors count, but not as typical ones.

        Raises:
            TraceError: another shape than the reference's; NaN.
        """
        check_shape(tap, self._reference[tap], state, "floor")
        error, before = relative_error(state, self._reference[tap]), self._errors.get(tap)
        if not torch.isfinite(error).all():
            raise TraceError(
                f"the floor or the reference contains NaN or infinity at tap {tap!r}: no error can be measured"
            )
        self._errors[tap] = error if before is None else torch.maximum(before, error)
        if not exchanged:
            self._typical[tap] = float(self._errors[tap].quantile(0.5))
        if before is None:
            self._digests[tap] = state_digest(state)

    def so_far(self, taps: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The errors of taps that all runs have passed, and JSON values that belong to them, for `go_on`."""
        done = [tap for tap in taps if tap in self._errors]
        rest: dict[str, Any] = {
            "digests": {tap: self._digests[tap] for tap in done},
            "typical": {tap: self._typical[tap] for tap in done},
        }
        return {tap: self._errors[tap] for tap in done}, rest

    def go_on(self, errors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        """Take what `so_far` returned."""
        self._errors = dict(errors)
        self._digests, self._typical = dict(rest["digests"]), dict(rest["typical"])

    def floor(self, expert_choices: Sequence[ExpertChoice] = ()) -> NoiseFloor:
        """Return the noise floor of the runs so far.

        Raises:
            TraceError: there was no run.
        """
        if self._first is None:
            raise TraceError("no noise floor given: record the reference in the candidate's dtype")
        return NoiseFloor(self._errors, self._digests, *self._first, self._typical, tuple(expert_choices))


def check_comparable(reference: Run, other: Run, name: str) -> None:
    """Raise TraceError if the reference is not in float64, or if `other` is of another prompt, model or positions.

    `name` is the name of `other` in the message.
    """
    mine, theirs = reference.provenance, other.provenance
    for run, which in ((mine, "reference"), (theirs, name)):
        if run.get("patches"):
            raise TraceError(
                f"the {which} was run with patches ({run['patches'][0]}), so it is not a run of this prompt: trace it without"
            )
    if mine["dtype"] != "float64":
        raise TraceError(f"the reference is a {mine['dtype']} trace: record it with dtype='float64'")
    for key, shown, what in (("model_digest", "model", "models"), ("prompt", "prompt", "prompts")):
        if theirs[key] != mine[key]:
            raise TraceError(
                f"reference and {name} are of different {what} ({mine[shown]} and {theirs[shown]}): they cannot be compared"
            )
    if not torch.equal(other.positions, reference.positions):
        raise TraceError(f"reference and {name} have different positions: trace both with the same ones")


def check_shape(tap: str, reference: torch.Tensor, state: torch.Tensor, name: str) -> None:
    """Raise TraceError if the shapes of a tap's states differ; `name` is the name of the second in the message."""
    if state.shape != reference.shape:
        raise TraceError(
            f"tap {tap!r} is {tuple(reference.shape)} in the reference, {tuple(state.shape)} in the {name}"
        )


def state_digest(state: torch.Tensor) -> str:
    """SHA-256 of a state's bytes."""
    return hashlib.sha256(raw_bytes(state)).hexdigest()


def floor_path(reference: str | Path, dtype: str) -> Path:
    """Return the path of a recorded reference's noise floor in `dtype`: next to it, `name.floor-dtype.safetensors`."""
    path = Path(reference)
    return path.with_name(f"{path.stem}.floor-{dtype}.safetensors")
