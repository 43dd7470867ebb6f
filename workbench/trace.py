"""Trace: named hidden states of one run of one engine, in memory or in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import TraceError
from .prompt import Prompt
from .version import __version__

FORMAT = "workbench-trace-1"
_PROVENANCE = {"engine", "model", "dtype", "device", "prompt", "tokens", "ranges"}


class Trace(Mapping[str, torch.Tensor]):
    """`trace["layers.3"]` is `[positions, hidden]` in the engine's dtype.

    Attributes:
        positions: int64 `[positions]`, the prompt positions that were kept.
        provenance: engine, model, dtype, device, prompt digest and ranges, versions.
    """

    def __init__(
        self,
        states: Mapping[str, torch.Tensor],
        *,
        positions: torch.Tensor,
        prompt: Prompt,
        engine: str,
        model: str,
        dtype: str,
        device: str,
    ) -> None:
        self._states = dict(states)
        self.positions = positions
        self.provenance: dict[str, Any] = {
            "engine": engine,
            "model": model,
            "dtype": dtype,
            "device": device,
            "prompt": prompt.digest,
            "tokens": len(prompt),
            "ranges": [list(pair) for pair in prompt.embedding_ranges],
            "workbench": __version__,
            "torch": torch.__version__,
        }

    def __getitem__(self, tap: str) -> torch.Tensor:
        try:
            return self._states[tap]
        except KeyError:
            raise KeyError(f"{tap!r} was not traced; this trace holds {', '.join(self._states)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        made = self.provenance
        return (
            f"Trace({len(self)} taps x {len(self.positions)} positions, {made['engine']} {made['dtype']}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all states together."""
        return sum(state.nbytes for state in self._states.values())

    def save(self, path: str | Path) -> None:
        """Write states and provenance to one safetensors file."""
        metadata = {
            "format": FORMAT,
            "positions": json.dumps(self.positions.tolist()),
            "taps": json.dumps(list(self)),
            "provenance": json.dumps(self.provenance),
        }
        try:
            save_file({tap: state.contiguous() for tap, state in self.items()}, path, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise TraceError(f"the trace cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            TraceError: not a trace file, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TraceError(f"{path} is not a trace of this version ({FORMAT}): record it again")
                taps = json.loads(metadata["taps"])
                kept = json.loads(metadata["positions"])
                if not isinstance(kept, list) or not all(type(position) is int for position in kept):
                    raise TraceError(f"{path}: its positions are no list of integers")
                positions = torch.tensor(kept, dtype=torch.int64)
                provenance = dict(json.loads(metadata["provenance"]))
                states = {tap: file.get_tensor(tap) for tap in taps}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path} cannot be read as a trace: {error}") from error
        lacking = _PROVENANCE - set(provenance)
        if lacking:
            raise TraceError(f"{path}: its provenance lacks {', '.join(sorted(lacking))}")
        for tap, state in states.items():
            if str(state.dtype).removeprefix("torch.") != provenance["dtype"]:
                raise TraceError(f"{path}: tap {tap!r} is {state.dtype}, its provenance says {provenance['dtype']}")
        wrong = [tap for tap, state in states.items() if state.ndim != 2 or len(state) != len(positions)]
        if wrong:
            raise TraceError(f"{path}: tap {wrong[0]!r} does not hold one row for each of {len(positions)} positions")
        trace = cls.__new__(cls)
        trace._states, trace.positions, trace.provenance = states, positions, provenance
        return trace
