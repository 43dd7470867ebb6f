"""How far a pass has come through the layers, so that an interrupted one can be continued at the layer where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .network import first as states_of


@dataclass
class LayerProgress:
    """The layers that a pass has run, and what the last of them returned.

    Attributes:
        done: number of layers that have run.
        state: `[1, seq, hidden]`, what the last of them returned; None before the first one.
        width: length of the tuple that layers return, the states first and None after them; 0 if they return the states alone.
        fault: why the pass cannot be continued from `state` alone; None if it can.
        skipped: number of layers that an interrupted run has run: this one leaves them out.
    """

    done: int = 0
    state: torch.Tensor | None = None
    width: int = 0
    fault: str | None = None
    skipped: int = 0

    def see_input(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note what a layer gets: something that layers can write to may carry more than the states from layer to layer."""
        for value in (*args[1:], *kwargs.values()):
            if not _unchanging(value):
                self.fault = f"layers share a {type(value).__name__}"

    def see_output(self, number: int, output: Any) -> None:
        """Note what layer `number` returns."""
        rest = output[1:] if isinstance(output, tuple) else ()
        if not isinstance(output, torch.Tensor | tuple) or any(each is not None for each in rest):
            self.fault = f"layers return more than their states ({type(output).__name__})"
        self.width = len(output) if isinstance(output, tuple) else 0
        self.done, self.state = number + 1, states_of(output)

    def skip(self, layer: nn.Module, last: bool) -> None:
        """Make a layer return without running; the last one that is skipped returns the state that it had returned."""
        state = self.state

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = state if last else (args[0] if args else kwargs["hidden_states"])
            return (given, *[None] * (self.width - 1)) if self.width else given

        layer.forward = forward  # type: ignore[method-assign]


def _unchanging(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_unchanging, value))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str | torch.dtype | torch.device)
