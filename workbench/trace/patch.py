"""Patches: states that take the place of a run's own at a tap, so that one can see what they change (activation patching)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import TraceError
from .positions import choose_positions
from .trace import Trace

_PATCHED = re.compile(r"embed|layers\.\d+(\.attention|\.mlp)?")


@dataclass(frozen=True)
class Patch:
    """States that a run puts in the place of its own. Its own states put there change no bit, but for a part that Transformers' class
    multiplies by a constant before it is added: there, within one rounding of the patched rows.

    Attributes:
        tap: `embed`, `layers.N`, `layers.N.attention` or `layers.N.mlp`; see `trace.taps`.
        positions: the prompt positions that get them; negative ones count from the end.
        states: `[positions, width]`, in the dtype of any run.
    """

    tap: str
    positions: Sequence[int]
    states: torch.Tensor

    @classmethod
    def of(cls, trace: Trace, tap: str, positions: Sequence[int], to: Sequence[int] | None = None) -> Patch:
        """The states of another run at some of its positions.

        Args:
            positions: positions in the prompt of `trace`.
            to: the positions that get them; default: the same.

        Raises:
            TraceError: the trace does not have the tap or a position.
        """
        rows = {position: row for row, position in enumerate(trace.positions.tolist())}
        lacking = [position for position in positions if position not in rows]
        if tap not in trace or lacking:
            what = f"tap {tap!r}" if tap not in trace else f"positions {lacking}"
            raise TraceError(f"the trace that the states come from lacks {what}: trace them")
        states = trace[tap][[rows[position] for position in positions]]
        return cls(tap, tuple(positions if to is None else to), states)


@dataclass(frozen=True)
class Patches:
    """Patches of one run that were checked. `by_tap`: for each tap its positions, int64 `[n]`, and states `[n, width]`."""

    by_tap: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def apply(self, tap: str, state: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The states `[..., tokens, width]` of a tap with the patches in them: a copy, or `state` itself if there are none.

        Args:
            factor: by which `state` is multiplied to become the tap's; the patches are divided by it.
        """
        if tap not in self.by_tap:
            return state
        positions, given = self.by_tap[tap]
        changed = state.clone(memory_format=torch.contiguous_format)
        rows = given.to(state)
        changed.view(-1, state.shape[-1])[positions.to(state.device)] = rows if factor == 1.0 else rows / factor
        return changed

    def described(self) -> list[str]:
        """Tap and positions of each patch, for a provenance."""
        return [f"{tap} at {positions.tolist()}" for tap, (positions, _) in self.by_tap.items()]


def check_patches(
    patches: Sequence[Patch], taps: Sequence[str], length: int, width: int, dtype: torch.dtype
) -> Patches:
    """Check patches for a prompt of `length` tokens and an engine with these taps, this hidden size and dtype.

    Raises:
        TraceError: a tap that cannot be patched, states of a wrong shape, which overflow in the dtype, or two patches of one state.
        ValueError: a position outside the prompt.
    """
    if isinstance(patches, Patch):
        raise TraceError("patches is one Patch: give a list of them")
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, patch in enumerate(patches):
        if not isinstance(patch, Patch):
            raise TraceError(
                f"patches[{number}] is {type(patch).__name__}: give workbench.Patch(tap, positions, states)"
            )
        if not isinstance(patch.tap, str) or not _PATCHED.fullmatch(patch.tap) or patch.tap not in taps:
            raise TraceError(
                f"patches[{number}]: states at {patch.tap!r} cannot be replaced: choose embed, layers.N, layers.N.attention or "
                "layers.N.mlp of a layer that this engine has"
            )
        positions = choose_positions(patch.positions, length)
        if not isinstance(patch.states, torch.Tensor):
            raise TraceError(
                f"patches[{number}], {patch.tap}: states are {type(patch.states).__name__}: give a tensor [{len(positions)}, {width}]"
            )
        shape = tuple(patch.states.shape)
        if shape != (len(positions), width):
            raise TraceError(
                f"patches[{number}], {patch.tap}: states {shape} for {len(positions)} positions of {width} numbers: give "
                f"[{len(positions)}, {width}]"
            )
        states = patch.states.detach().cpu()
        if bool((states.isfinite() & ~states.to(dtype).isfinite()).any()):
            raise TraceError(
                f"patches[{number}], {patch.tap}: its states overflow in {str(dtype).removeprefix('torch.')}: run the engine in a "
                "wider dtype"
            )
        states = states.to(dtype)
        before = found.get(patch.tap)
        if before is not None:
            positions, states = torch.cat([before[0], positions]), torch.cat([before[1], states])
        if len(positions.unique()) < len(positions):
            raise TraceError(
                f"patches[{number}], {patch.tap}: a position is patched twice: positions {positions.tolist()}"
            )
        found[patch.tap] = positions, states
    return Patches(found)
