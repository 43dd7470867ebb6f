"""Trace: named hidden states of one run of one engine, in memory or in a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import TraceError
from ..models import Model
from ..prompt import Prompt
from .files import StoredStates, TraceWriter, readable
from .provenance import provenance_of
from .taps import decoder_taps


@dataclass(frozen=True)
class TracePlan:
    """The shapes and size of a trace, known before the model runs.

    Attributes:
        shapes: `{tap: (positions, width)}`, in the order in which taps are computed.
        positions: int64 `[positions]`, the prompt positions that are kept.
        dtype: of the states.
    """

    shapes: Mapping[str, tuple[int, int]]
    positions: torch.Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Total bytes of all states."""
        return sum(rows * width for rows, width in self.shapes.values()) * self.dtype.itemsize

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{len(self.shapes)} taps x {len(self.positions)} positions in {name}: {self.nbytes / 1e6:.1f} MB"

    def check_room(self, room: int, where: str, other_fix: str) -> None:
        """Raise TraceError if the states take more than `room` bytes.

        Args:
            where: completes "they do not fit ...", such as "into half of the free memory".
            other_fix: another fix, appended to the message.
        """
        if self.nbytes > room:
            logits = self.shapes.get("logits")
            heavy = logits and logits[0] * logits[1] * self.dtype.itemsize * 2 > self.nbytes
            raise TraceError(
                f"{self} do not fit {where} ({room / 1e6:.1f} MB): choose fewer taps or positions"
                f"{' (logits are more than half of the bytes)' if heavy else ''}{other_fix}"
            )


class Trace(Mapping[str, torch.Tensor]):
    """Hidden states of one run, a mapping by tap name: `trace["layers.3"]` is `[positions, hidden]` in the engine's dtype.

    States are CPU tensors in memory, or are read from a file on access (`load`).

    Attributes:
        positions: int64 `[positions]`, the prompt positions that were kept.
        provenance: what produced the run: engine, model and its digest, dtype, device, prompt digest and ranges, versions.
    """

    def __init__(
        self, states: Mapping[str, torch.Tensor], positions: torch.Tensor, provenance: Mapping[str, Any]
    ) -> None:
        self._states = states
        self.positions = positions
        self.provenance = dict(provenance)

    @classmethod
    def from_tensors(
        cls,
        states: Mapping[str, torch.Tensor],
        prompt: Prompt,
        model: Model,
        *,
        dtype: str,
        positions: Sequence[int] | None = None,
        engine: str = "imported",
    ) -> Trace:
        """A trace of states that another program computed.

        Args:
            states: by tap, `[positions, width]`; kept in `dtype`.
            dtype: what they were computed in.
            positions: the prompt positions of their rows; None: all.
            engine: the program's name.

        Raises:
            TraceError: no states, an unknown tap, or rows or widths that are not the prompt's and the model's.
        """
        kept = torch.arange(len(prompt)) if positions is None else torch.as_tensor(list(positions), dtype=torch.int64)
        config = model.text_config
        known = decoder_taps(config.num_hidden_layers)
        if not states:
            raise TraceError("no states were given: give at least one tap")
        if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= len(prompt)):
            raise TraceError(
                f"positions are {int(kept.min())} to {int(kept.max())} of a prompt of {len(prompt)} tokens"
            )
        for tap, state in states.items():
            if tap not in known:
                raise TraceError(
                    f"{tap!r} is not a tap: they are embed, layers.0 to layers.{config.num_hidden_layers - 1}, with .attention and .mlp, norm and logits"
                )
            width = config.vocab_size if tap == "logits" else config.hidden_size
            if tuple(state.shape) != (len(kept), width):
                raise TraceError(
                    f"{tap} is {list(state.shape)}: for {len(kept)} positions it must be [{len(kept)}, {width}]"
                )
        stored = getattr(torch, dtype)
        provenance = provenance_of(prompt, engine=engine, model=model, dtype=stored, device=torch.device("cpu"))
        ordered = {tap: states[tap].detach().cpu().to(stored) for tap in known if tap in states}
        return cls(ordered, kept, provenance)

    def __getitem__(self, tap: str) -> torch.Tensor:
        try:
            return self._states[tap]
        except KeyError:
            raise KeyError(f"{tap!r} was not traced; this trace contains {readable(list(self._states))}") from None

    def __contains__(self, tap: object) -> bool:
        return any(tap == name for name in self._states)  # Mapping's default would read the whole state from disk

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
        """Total bytes of all states."""
        if isinstance(self._states, StoredStates):
            return self._states.nbytes
        return sum(state.nbytes for state in self._states.values())

    @property
    def spans(self) -> torch.Tensor:
        """For each kept position the index of the embedding range that contains it, int64 `[positions]`; -1 for text."""
        spans = torch.full((len(self.positions),), -1, dtype=torch.int64)
        for number, (start, stop) in enumerate(self.provenance["ranges"]):
            spans[(self.positions >= start) & (self.positions < stop)] = number
        return spans

    def save(self, path: str | Path) -> None:
        """Write states and provenance to one safetensors file.

        Raises:
            TraceError: the file cannot be written.
        """
        dtype = getattr(torch, self.provenance["dtype"])
        shapes = {tap: (state.shape[0], state.shape[1]) for tap, state in self.items()}
        with TraceWriter(path, shapes, dtype, self.positions, self.provenance) as writer:
            for tap, state in self.items():
                writer.write(tap, state)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Open a file that `save` or `engine.trace(..., path=...)` wrote; each tap is read, and its checksum verified, on access.

        Raises:
            TraceError: the file is not a trace, or is damaged. Damage to a tap's states is raised when that tap is accessed.
        """
        stored = StoredStates(path)
        return cls(stored, stored.positions, stored.provenance)
