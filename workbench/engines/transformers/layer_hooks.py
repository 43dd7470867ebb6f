"""Hooks on the layers of the reference: they pass on states, check sums, and put other states in the place of the run's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...trace.patch import Patches
from ..base import Sink
from .layer_progress import LayerProgress
from .network import Network, first, with_states
from .structure import Structure

_SUM_TOLERANCE = 1e-9
"""Largest difference, relative to the largest value, between a layer and the sum of its parts in float64."""


Given = Callable[[str], torch.Tensor | None]


@contextlib.contextmanager
def layer_hooks(
    network: Network,
    structure: Structure,
    wanted: set[str],
    pass_on: Sink,
    layer_done: Callable[[int, torch.Tensor], None],
    given: Given,
    progress: LayerProgress,
    patches: Patches,
) -> Iterator[None]:
    """Hook the layers for the duration of a pass. In float64 what a layer adds is compared with the sum of its two parts.

    Args:
        wanted: the taps that are traced.
        pass_on: called with `embed` and with what attention and MLP add.
        layer_done: called with each layer's number and its output.
        given: returns for `embed` and for layers the states that take the place of the run's own after those were passed on, or None.
        progress: is told what layers get and return; layers that it skips are not hooked.
        patches: put into the run's own states before they are passed on.

    Raises:
        ModelError: in the pass: a layer is not the sum of its input and its parts.
    """
    exact = network.dtype is torch.float64
    hooks: list[Any] = []
    sums: dict[int, torch.Tensor] = {}

    def parts_wanted(number: int) -> bool:
        taps = (f"layers.{number}.attention", f"layers.{number}.mlp")
        return structure.parts[number] is not None and not (wanted | set(patches.by_tap)).isdisjoint(taps)

    def enter(number: int) -> Any:
        def look(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            state = args[0] if args else kwargs["hidden_states"]
            changed = None
            progress.see_input(args, kwargs)
            if number == 0:
                own, state = state, patches.apply("embed", state)
                pass_on("embed", state)
                if (other := given("embed")) is not None:
                    state = other[None]
                if state is not own:
                    changed = ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
            if exact and parts_wanted(number):
                sums[number] = state.clone()  # a layer may add to its input in place
            return changed

        return look

    def add(number: int, name: str, factor: float) -> Any:
        def look(module: nn.Module, args: tuple, output: Any) -> Any:
            own = first(output)
            added = own if factor == 1.0 else own * factor
            state = patches.apply(f"layers.{number}.{name}", added)
            pass_on(f"layers.{number}.{name}", state)
            if exact:
                sums[number] = sums[number] + state.reshape(sums[number].shape)
            if state is added:
                return None
            # Rows that are not patched keep their bits, whatever the factor.
            return with_states(output, patches.apply(f"layers.{number}.{name}", own, factor))

        return look

    def leave(number: int) -> Any:
        def look(module: nn.Module, args: tuple, output: Any) -> Any:
            state, total = first(output), sums.pop(number, None)
            if total is not None:
                _check_sum(network, number, total, state)
            own, state = state, patches.apply(f"layers.{number}", state)
            layer_done(number, state)
            if (other := given(f"layers.{number}")) is not None:
                state = other[None]
            changed = None if state is own else with_states(output, state)
            progress.see_output(number, output if changed is None else changed)
            return changed

        return look

    try:
        for number, layer in enumerate(network.layers or () if structure.states else ()):
            if number < progress.skipped:
                progress.skip(layer, number == progress.skipped - 1)
                continue
            hooks.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
            parts = structure.parts[number]
            if parts is not None and parts_wanted(number):
                for name, addend in (("attention", parts.attention), ("mlp", parts.mlp)):
                    module = layer.get_submodule(addend.path)
                    hooks.append(module.register_forward_hook(add(number, name, addend.factor)))
            hooks.append(layer.register_forward_hook(leave(number)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_sum(network: Network, number: int, total: torch.Tensor, state: torch.Tensor) -> None:
    off = float((total - state).abs().max() / state.abs().max().clamp(min=1e-300))
    if off > _SUM_TOLERANCE:
        raise ModelError(
            f"in layer {number} of {type(network.module).__name__} attention and MLP do not sum up to what the layer adds (off by "
            f"{off:.1e} of its largest value): choose taps without layers.{number}.attention and layers.{number}.mlp"
        )
