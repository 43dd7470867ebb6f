"""The noise floor of a prompt: what rounding does to the reference, tap by tap, token by token."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import TraceError
from ..provenance import check_provenance
from ..trace import Trace
from ..trace_files import raw_bytes
from ..whole_files import write_whole
from .metrics import relative_error

FORMAT = "workbench-floor-1"


@dataclass(frozen=True)
class NoiseFloor:
    """Errors of the reference in an engine's dtype against the float64 run: kilobytes where the traces are gigabytes.

    Attributes:
        errors: `{tap: float64 [positions]}`, the worst of all runs.
        digests: `{tap: SHA-256 of the plain run's states}`, which tells "same" from "noise".
        positions, provenance: of the plain run.
    """

    errors: Mapping[str, torch.Tensor]
    digests: Mapping[str, str]
    positions: torch.Tensor
    provenance: Mapping[str, Any]

    @classmethod
    def measure(cls, truth: Trace, runs: Trace | Sequence[Trace], taps: Sequence[str] | None = None) -> NoiseFloor:
        """From the float64 trace and one or several in the engine's dtype, the plain one first.

        Raises:
            TraceError: no run; runs of another prompt, model, dtype or positions than each other or the truth; NaN in one.
        """
        several = [runs] if isinstance(runs, Trace) else list(runs)
        if not several:
            raise TraceError("no noise floor given: record the reference in the candidate's dtype")
        dtype = several[0].provenance["dtype"]
        for run in several:
            check_comparable(truth, run, "floor")
            if run.provenance["dtype"] != dtype:
                raise TraceError(f"floors in {dtype} and {run.provenance['dtype']}: rounding differs; use one dtype")
        errors, digests = {}, {}
        for tap in [tap for tap in truth if tap in several[0]] if taps is None else taps:
            worst = None
            for number, run in enumerate(several):
                if tap not in run:
                    raise TraceError(f"the floor lacks tap {tap!r}: trace it with the taps of the candidate")
                state = run[tap]
                check_shape(tap, truth[tap], state, "floor")
                error = relative_error(state, truth[tap])
                if not torch.isfinite(error).all():
                    raise TraceError(
                        f"the floor or the reference holds NaN or infinity at tap {tap!r}: it cannot be a measure"
                    )
                worst = error if worst is None else torch.maximum(worst, error)
                if number == 0:
                    digests[tap] = state_digest(state)
            assert worst is not None
            errors[tap] = worst
        return cls(errors, digests, several[0].positions, several[0].provenance)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        metadata = {
            "format": FORMAT,
            "positions": json.dumps(self.positions.tolist()),
            "digests": json.dumps(dict(self.digests)),
            "crc32": json.dumps({tap: f"{zlib.crc32(raw_bytes(error)):08x}" for tap, error in self.errors.items()}),
            "provenance": json.dumps(dict(self.provenance)),
        }
        try:
            # save_file would make a file that only its owner can read.
            write_whole(path, save({tap: error.contiguous() for tap, error in self.errors.items()}, metadata))
        except (SafetensorError, OSError) as error:
            raise TraceError(f"the noise floor cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> NoiseFloor:
        """Read what `save` wrote.

        Raises:
            TraceError: not a noise floor, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TraceError(
                        f"{path} is not a noise floor of this version ({FORMAT}): record the reference again"
                    )
                provenance = check_provenance(json.loads(metadata["provenance"]), path)
                digests, kept = json.loads(metadata["digests"]), json.loads(metadata["positions"])
                sums = json.loads(metadata["crc32"])
                if not isinstance(digests, dict) or not isinstance(sums, dict):
                    raise TraceError(f"{path}: its digests and checksums are no JSON objects")
                errors = {tap: file.get_tensor(tap) for tap in digests}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path} cannot be read as a noise floor: {error}") from error
        if not isinstance(kept, list) or not all(type(position) is int for position in kept):
            raise TraceError(f"{path}: its positions are no list of integers")
        for tap, sizes in errors.items():
            if f"{zlib.crc32(raw_bytes(sizes)):08x}" != sums.get(tap):
                raise TraceError(
                    f"{path}: the floor of tap {tap!r} was damaged or changed: copy it again, or record it again"
                )
            if (
                sizes.shape != (len(kept),)
                or sizes.dtype != torch.float64
                or not ((sizes >= 0) & torch.isfinite(sizes)).all()
            ):
                raise TraceError(f"{path}: the floor of tap {tap!r} is not one number of at least 0 for each position")
        return cls(errors, digests, torch.tensor(kept, dtype=torch.int64), provenance)


def check_comparable(truth: Trace, other: Trace | NoiseFloor, name: str) -> None:
    """Refuse what cannot be held against the truth: another prompt, another model, other positions."""
    mine, theirs = truth.provenance, other.provenance
    if mine["dtype"] != "float64":
        raise TraceError(f"the reference is a {mine['dtype']} trace: record it with dtype='float64'")
    for key, shown, what in (("model_digest", "model", "models"), ("prompt", "prompt", "prompts")):
        if theirs[key] != mine[key]:
            raise TraceError(
                f"reference and {name} are of different {what} ({mine[shown]} and {theirs[shown]}): their difference says nothing"
            )
    if not torch.equal(other.positions, truth.positions):
        raise TraceError(f"reference and {name} keep different positions: trace both with the same ones")


def check_shape(tap: str, truth: torch.Tensor, state: torch.Tensor, name: str) -> None:
    """Refuse states of different widths."""
    if state.shape != truth.shape:
        raise TraceError(f"tap {tap!r} is {tuple(truth.shape)} in the reference, {tuple(state.shape)} in the {name}")


def state_digest(state: torch.Tensor) -> str:
    """SHA-256 of a state's bytes."""
    return hashlib.sha256(raw_bytes(state)).hexdigest()
