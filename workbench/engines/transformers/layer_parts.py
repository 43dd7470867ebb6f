"""What a decoder layer adds to the residual stream: which of its modules do it, and by what factor, found by running the layer.

Classes differ: a norm may follow attention, its output may be multiplied by a constant, attention and MLP may run side by side.
A layer on random states shows which pair of outputs, and which factors, sum up to what the layer adds.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .lazy_experts import LazyExperts


@dataclass(frozen=True)
class Addend:
    """A module of a layer, by its path in it, and the factor by which its output is added to the residual stream."""

    path: str
    factor: float


@dataclass(frozen=True)
class LayerParts:
    """The two addends of a layer: layer(x) = x + attention + mlp. `attention` is whatever mixes tokens: it may be linear attention."""

    attention: Addend
    mlp: Addend


def layer_kind(layer: nn.Module) -> tuple:
    """What layers of the same structure share."""
    modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    parameters = tuple(name for name, _ in layer.named_parameters())
    return (modules, parameters, getattr(layer, "attention_type", None), getattr(layer, "layer_type", None))


@torch.no_grad()
def find_parts(layer: nn.Module, args: tuple, kwargs: dict[str, Any], config: Any) -> LayerParts | None:
    """Find the addends of a layer, whose weights must be loaded, from the arguments of one of its calls.

    Returns None if no two of its modules' outputs sum up, with known factors, to what the layer adds to random states: the layer
    scales its input, adds more than two parts, or rounding hides which modules they are.
    """
    state = _states(args[0] if args else kwargs["hidden_states"])
    if state is None or state.ndim != 3:
        return None
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        return None  # the layer would store random keys in the cache of the pass
    # In 16 bits the rounding of the sum would hide small parts, so the layer is run in float32 there.
    dtype = state.dtype if state.dtype.itemsize >= 4 else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(state.shape, generator=generator).to(state.device, dtype)
    outputs: list[tuple[str, torch.Tensor]] = []

    def note(path: str, output: Any) -> None:
        output = _states(output)
        if output is not None and output.numel() == x.numel() and output.shape[-1] == x.shape[-1]:
            outputs.append((path, output.reshape(x.shape).double().clone()))  # a class may add to it in place

    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: note(path, output))
        for path, module in layer.named_modules()
        if path and path.count(".") < _DEPTH
    ]
    try:
        args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        with _in_dtype(layer, dtype):
            given = x.clone()
            y = _states(
                layer.forward(given, *args[1:], **kwargs)
                if args
                else layer.forward(**{**kwargs, "hidden_states": given})
            )
    except Exception:  # the layer needs what only a call in its place can give it
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if y is None or y.shape != x.shape:
        return None
    return _fit(x.double(), y.double(), outputs, _factors(layer, config), torch.finfo(x.dtype).eps)


@contextlib.contextmanager
def _in_dtype(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give a layer parameters and buffers in another dtype for a while."""
    held: list[dict[str, Any]] = [
        tensors for module in layer.modules() for tensors in (module._parameters, module._buffers)
    ]
    own = [
        (tensors, name, tensor)
        for tensors in held
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point() and tensor.dtype is not dtype
    ]
    own += [
        (vars(module), name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, LazyExperts)
    ]
    try:
        for tensors, name, tensor in own:
            cast = tensor.in_dtype(dtype) if isinstance(tensor, LazyExperts) else tensor.detach().to(dtype)
            tensors[name] = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast  # type: ignore[arg-type]
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return type(value)(_cast(each, dtype) for each in value) if type(value) in (tuple, list) else value


_DEPTH = 2
"""How deep in a layer its addends may be: `self_attn` is 1, `mlp.dropout` is 2."""


def _fit(
    x: torch.Tensor, y: torch.Tensor, outputs: list[tuple[str, torch.Tensor]], factors: Sequence[float], eps: float
) -> LayerParts | None:
    added, noise = y - x, 4 * eps * float(y.square().mean().sqrt())
    outputs = _distinct(outputs)
    best: tuple[float, tuple[str, str], tuple[float, float]] | None = None
    for (first, a), (second, b) in itertools.combinations(outputs, 2):
        pair = torch.stack([a.flatten(), b.flatten()], dim=1)
        fitted = torch.linalg.lstsq(pair, added.flatten()[:, None]).solution.flatten().tolist()
        known = [_nearest(factors, value) for value in fitted]
        close = all(abs(one - other) <= 0.05 * abs(other) for one, other in zip(fitted, known, strict=True))
        if not close:
            continue
        rest = float((added - known[0] * a - known[1] * b).square().mean().sqrt())
        if best is None or rest < best[0] * 0.99:
            best = rest, (first, second), (known[0], known[1])
    if best is None or best[0] > noise:
        return None
    by_path = dict(outputs)
    # Each of the two must stand out from the rounding of the sum; else another module could be meant.
    if any(abs(f) * float(by_path[p].square().mean().sqrt()) < 3 * noise for p, f in zip(*best[1:], strict=True)):
        return None
    one, two = (Addend(path, factor) for path, factor in zip(*best[1:], strict=True))
    return LayerParts(two, one) if _mixes_tokens(two.path) and not _mixes_tokens(one.path) else LayerParts(one, two)


def _nearest(factors: Sequence[float], value: float) -> float:
    return min(factors, key=lambda each: abs(each - value))


def _distinct(outputs: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """The outputs that differ, each under the shortest of its paths; outputs that are zero are left out."""
    kept: list[tuple[str, torch.Tensor]] = []
    for path, output in sorted(outputs, key=lambda each: each[0].count(".")):
        if bool(output.any()) and not any(torch.equal(output, other) for _, other in kept):
            kept.append((path, output))
    order = {path: number for number, (path, _) in enumerate(outputs)}
    return sorted(kept, key=lambda each: order[each[0]])


def _mixes_tokens(path: str) -> bool:
    return any(word in path.lower() for word in ("attn", "attention", "mixer", "mamba", "conv", "temporal", "time_mix"))


def _factors(layer: nn.Module, config: Any) -> list[float]:
    """1, and the constants of a layer and its configuration that may be a factor; MiniCPM divides one by the root of the layers."""
    constants = {1.0}
    for value in (*vars(layer).values(), *(config.to_dict().values())):
        if isinstance(value, float) and 1e-3 < abs(value) < 1e3:
            constants |= {value, value / math.sqrt(config.num_hidden_layers)}
    return sorted(constants)


def _states(output: Any) -> torch.Tensor | None:
    output = output[0] if isinstance(output, tuple | list) and output else output
    return output if isinstance(output, torch.Tensor) and output.is_floating_point() else None
