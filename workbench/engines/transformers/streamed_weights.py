"""Weights that are read from the checkpoint when a module runs and dropped afterwards: a large reference needs memory for one layer.

    network on the meta device -> before a layer runs: map its tensors, cast them to the engine's dtype -> after it: drop them

Tensors are memory-mapped: if the checkpoint fits into the operating system's page cache, a pass costs little more than with
weights in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ...models import Model
from ...models.checkpoint import Checkpoint
from ...models.sources import FolderSource

RESIDENT_BYTES = 1 << 28
"""If its weights take more bytes, a reference on the CPU reads them when a layer runs, if the checkpoint allows it."""
_HEAD_ROWS = 4096


class StreamedWeights:
    """Hooks that load and drop the weights of a network whose parameters are on the meta device.

    Args:
        network: Transformers' model; its decoder has `layers`.
        names: for every parameter its name in the checkpoint, from `checkpoint_names`.
        dtype: the dtype that weights are cast to; of the token embedding, only the looked-up rows are cast.
    """

    def __init__(self, network: Any, model: Model, names: dict[str, str], dtype: torch.dtype) -> None:
        # Mappings of its own, so that releasing their memory after use does not affect `model.weights`.
        self._source = FolderSource(model.path)
        self._checkpoint = Checkpoint(self._source)
        self._names, self._dtype = names, dtype
        self._qualified = {module: name for name, module in network.named_modules()}
        # All layers are cast into the same buffers, since their shapes are equal: the allocator would keep freed ones.
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        layers = list(network.get_decoder().layers)
        inside = {module for layer in layers for module in layer.modules()}
        others = [
            module
            for module in network.modules()
            if module not in inside and any(True for _ in _own_parameters(module))
        ]
        self._layers = set(layers)
        for unit in (*layers, *others):
            if type(unit) is nn.Linear and unit not in self._layers and dtype.itemsize > 2:
                # A large head would set the memory peak; outputs are independent sums, so rows can be cast in blocks.
                unit.forward = partial(self._linear_in_blocks, unit)  # type: ignore[method-assign]
                continue
            lookup_only = type(unit) is nn.Embedding  # subclasses may compute with the whole weight
            unit.register_forward_pre_hook(lambda module, args, cast=not lookup_only: self._load(module, cast))
            unit.register_forward_hook(
                lambda module, args, output, cast=lookup_only: self._drop(module, output if cast else None),
                always_call=True,
            )

    def _load(self, unit: nn.Module, cast: bool) -> None:
        for module, attribute, name in self._parameters(unit):
            tensor = self._checkpoint.get(name)
            if cast and tensor.dtype is not self._dtype:
                tensor = self._cast(unit, module, attribute, tensor)
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)

    def _linear_in_blocks(self, unit: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weights = {attribute: name for _, attribute, name in self._parameters(unit)}
        stored = self._checkpoint.get(weights["weight"])
        out = x.new_empty((*x.shape[:-1], len(stored)))
        for first in range(0, len(stored), _HEAD_ROWS):
            rows = stored[first : first + _HEAD_ROWS]
            out[..., first : first + _HEAD_ROWS] = x @ rows.to(self._dtype).T
            self._release(weights["weight"], first * stored.stride(0) * stored.itemsize, rows.nbytes)
        self._release(weights["weight"])
        return out + self._checkpoint.get(weights["bias"]).to(self._dtype) if "bias" in weights else out

    def _release(self, name: str, offset: int = 0, size: int | None = None) -> None:
        """Let the operating system drop the mapped pages of a tensor, or of `size` bytes of it from `offset` on."""
        entry = self._checkpoint.entries([name])[name]
        start = entry.start + offset
        self._source.release(entry.shard, start, entry.stop if size is None else start + size)

    def _cast(self, unit: nn.Module, module: nn.Module, attribute: str, tensor: torch.Tensor) -> torch.Tensor:
        if unit not in self._layers:
            return tensor.to(self._dtype)
        inside = self._qualified[module].removeprefix(self._qualified[unit])
        key = (f"{inside}.{attribute}", tuple(tensor.shape))
        if key not in self._buffers:
            self._buffers[key] = torch.empty(tensor.shape, dtype=self._dtype)
        return self._buffers[key].copy_(tensor)

    def _drop(self, unit: nn.Module, output: torch.Tensor | None) -> torch.Tensor | None:
        """Move a unit back to the meta device; cast the output of a lookup, which is in the stored dtype."""
        for module, attribute, name in self._parameters(unit):
            shape = module._parameters[attribute].shape  # type: ignore[union-attr]
            module._parameters[attribute] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            self._release(name)
        return None if output is None else output.to(self._dtype)

    def _parameters(self, unit: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
        """Module, attribute and name in the checkpoint of every parameter of a unit."""
        for module in unit.modules():
            prefix = self._qualified[module]
            for attribute in _own_parameters(module):
                yield module, attribute, self._names[f"{prefix}.{attribute}" if prefix else attribute]


def _own_parameters(module: nn.Module) -> Iterator[str]:
    return (name for name, parameter in module._parameters.items() if parameter is not None)


def checkpoint_names(network: Any, model: Model) -> dict[str, str] | None:
    """Map the name of every parameter of a network to its name in the checkpoint.

    Returns None if its weights cannot be streamed and Transformers must load the model: tensors have other names or shapes in the
    checkpoint, or the network is not a plain stack of decoder layers.
    """
    decoder = network.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        return None
    tensors = model.weights.entries(model.weights)
    tied = {}
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    if head is not None and getattr(network.config, "tie_word_embeddings", False):
        of = {id(module): name for name, module in network.named_modules()}
        tied = {f"{of[id(head)]}.weight": f"{of[id(table)]}.weight"}
    names = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        stored = tied.get(name, name)
        entry = tensors.get(stored)
        if entry is None or entry.shape != tuple(parameter.shape) or not entry.dtype.is_floating_point:
            return None
        names[name] = stored
    return names if len(set(names.values())) == len(tensors) else None
