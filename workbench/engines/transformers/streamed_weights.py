"""Weights that are read from the checkpoint when a part of the model runs and dropped afterwards: memory for one layer is enough.

    network on the meta device -> before a layer runs: read its tensors, cast them to the run's dtype -> after it: drop them

Local tensors are memory-mapped: if the checkpoint fits into the operating system's page cache, a pass costs little more than with
weights in memory. Several passes can go through each layer together, so that its weights are read once (`lockstep.py`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...models.sources import Source
from .lazy_experts import LazyExperts
from .parameter_reader import ParameterReader

_BLOCK_BYTES = 1 << 28
"""Bytes of a head that are cast at a time."""
_EXPERT_BYTES = 1 << 31
"""If the experts of a layer take more bytes in the run's dtype, they are read one at a time."""
_LARGE_TABLE = 1 << 26
"""If a table of embeddings takes more bytes in the run's dtype, only the rows that are looked up are read."""

_SMALL = 1 << 20
"""Parameters outside the layers that take fewer bytes, as norms, stay in memory; and so do buffers."""

Arrive = Callable[[str], None]
"""Called with a unit's name before its weights are read: a layer, or a module outside the layers."""


class StreamedWeights:
    """The weights of one model in one dtype on one device, for any number of passes.

    Args:
        network: Transformers' model with its parameters on the meta device; it stays as it is.
        reader: reads its parameters.
        dtypes: of the parameters in the run (`parameter_dtypes`).
        dtype, device: of the run.
        source: where the checkpoint's files are.
        layers: the path of the decoder's list of layers in the network; "" if there is none.

    Attributes:
        units: what is read and dropped at a time, with the names of its parameters: each layer, and each other module with a large
            parameter.
    """

    def __init__(
        self,
        network: Any,
        reader: ParameterReader,
        dtypes: Mapping[str, torch.dtype],
        dtype: torch.dtype,
        device: torch.device,
        source: Source,
        layers: str,
    ) -> None:
        self._network, self._reader, self._source = network, reader, source
        self._dtypes, self._dtype, self._device = dtypes, dtype, device
        self._layers = layers
        buffers = {name for name, _ in network.named_buffers()} & set(reader.shapes)
        small = [
            name
            for name in reader.shapes
            if name in buffers or (not self._inside_layers(name) and self._bytes(name) < _SMALL)
        ]
        self._resident = reader.read(small, dtypes, device)
        self.units = dict(self._find_units())
        # Of the right shape, dtype and device; what a class computes with weights that are not read is NaN.
        self._placeholders = {
            name: torch.full((), float("nan"), dtype=dtypes[name], device=device).expand(reader.shapes[name])
            for names in self.units.values()
            for name in names
        }
        self._held: tuple[str, dict[str, Any]] | None = None
        # All layers are cast into the same buffers, since their shapes are equal: the allocator would keep freed ones.
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def stored_bytes(self) -> int:
        """Bytes that a pass reads."""
        return sum(map(self.unit_bytes, self.units))

    @property
    def parameters(self) -> int:
        """Number of parameters that a pass reads."""
        return sum(torch.Size(self._reader.shapes[name]).numel() for names in self.units.values() for name in names)

    @property
    def layer_units(self) -> list[str]:
        """The names of the layers, in order."""
        return [unit for unit in self.units if self._inside_layers(unit)]

    @property
    def largest_layer(self) -> int:
        """Bytes that the largest layer takes in memory in the run's dtype."""
        return max(map(self._unit_bytes, self.layer_units), default=0)

    def seconds_per_byte(self, sample: int) -> float:
        """Measure how long a byte takes to read, on up to `sample` bytes from the middle of the checkpoint."""
        entries = [
            entry for names in self.units.values() for each in self._reader.sources(names) for entry in each.entries
        ]
        entry = entries[len(entries) // 2]
        size = min(entry.bytes, sample)
        began = time.perf_counter()
        self._source.read(entry.shard, entry.start, entry.start + size)
        return (time.perf_counter() - began) / max(size, 1)

    def unit_bytes(self, unit: str) -> int:
        """Bytes of the checkpoint that a unit is read from."""
        return sum(each.stored_bytes for each in self._reader.sources(self.units[unit]))

    def new_network(self, arrive: Arrive | None = None, skipped: int = 0) -> Any:
        """A copy of the network that streams its weights.

        Args:
            arrive: called before each unit runs; None: units are dropped as soon as they have run.
            skipped: the weights of so many layers at the beginning are never read.
        """
        network = copy.deepcopy(self._network)
        for name, tensor in self._resident.items():
            _put(network, name, tensor)
        for name in self._placeholders:
            _put(network, name, self._placeholders[name])
        left_out = {f"{self._layers}.{number}" for number in range(skipped)}
        for unit in self.units:
            if unit in left_out:
                continue
            self._stream(unit, network.get_submodule(unit) if unit else network, arrive)
        return network

    def drop(self, unit: str) -> None:
        """Forget a unit's weights, and let the operating system drop the pages that they were read from."""
        if self._held is not None and self._held[0] == unit:
            self._held = None
        for stored in self._reader.sources(self.units[unit]):
            for entry in stored.entries:
                self._source.release(entry.shard, entry.start, entry.stop)

    def forget(self) -> None:
        """Drop the memory that is kept between units."""
        self._held = None
        self._buffers.clear()

    def _find_units(self) -> Iterator[tuple[str, list[str]]]:
        """The units and their parameters: each layer, and each other module with large parameters of its own."""
        owners: dict[str, list[str]] = {}
        for name in self._reader.shapes:
            if name not in self._resident:
                path = name.rpartition(".")[0]
                depth = self._layers.count(".") + 2
                owner = ".".join(path.split(".")[:depth]) if self._inside_layers(name) else path
                owners.setdefault(owner, []).append(name)
        yield from owners.items()

    def _inside_layers(self, name: str) -> bool:
        """Whether a parameter or unit belongs to a layer."""
        return bool(self._layers) and name.startswith(f"{self._layers}.")

    def _unit_bytes(self, unit: str) -> int:
        lazy = set(self._lazy(unit))
        return sum(
            self._bytes(name) // (self._reader.experts(name) if name in lazy else 1) for name in self.units[unit]
        )

    def _bytes(self, name: str) -> int:
        return torch.Size(self._reader.shapes[name]).numel() * self._dtypes[name].itemsize

    def _lazy(self, unit: str) -> list[str]:
        """The parameters of a unit whose experts are read one at a time."""
        stacked = [name for name in self.units[unit] if self._reader.experts(name)]
        return stacked if sum(map(self._bytes, stacked)) > _EXPERT_BYTES else []

    def _stream(self, unit: str, module: nn.Module, arrive: Arrive | None) -> None:
        names = self.units[unit]
        outside = not self._inside_layers(unit)
        large = sum(map(self._bytes, names)) > (_BLOCK_BYTES if type(module) is nn.Linear else _LARGE_TABLE)
        if outside and large and type(module) is nn.Linear and self._dtype.itemsize > 2:
            # A large head would set the memory peak; outputs are independent sums, so rows can be cast in blocks.
            module.forward = partial(self._linear_in_blocks, unit, module, arrive)  # type: ignore[method-assign]
        elif outside and large and _takes_ids(module) and self._reader.as_stored(f"{unit}.weight"):
            module.forward = partial(self._looked_up, unit, module, module.forward, arrive)  # type: ignore[method-assign]
        else:
            module.register_forward_pre_hook(lambda module, args: self._load(unit, module, arrive), prepend=True)
            module.register_forward_hook(
                lambda module, args, output: self._unload(unit, module, arrive), always_call=True
            )

    def _load(self, unit: str, module: nn.Module, arrive: Arrive | None) -> None:
        if arrive is not None:
            arrive(unit)
        if self._held is None or self._held[0] != unit:
            self._held = (unit, self._read(unit))
        for name, value in self._held[1].items():
            owner, attribute = _owner(module, unit, name)
            if isinstance(value, LazyExperts):
                owner._parameters.pop(attribute, None)  # gone already if the last pass was interrupted
                owner.__dict__[attribute] = value
            else:
                owner.__dict__.pop(attribute, None)
                owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    def _read(self, unit: str) -> dict[str, Any]:
        with _needed_for(unit):
            return self._read_unit(unit)

    def _read_unit(self, unit: str) -> dict[str, Any]:
        lazy = self._lazy(unit)
        whole = [name for name in self.units[unit] if name not in lazy]
        found: dict[str, Any] = {}
        for name in whole:
            stored = self._reader.as_stored(name)
            reuse = self._device.type == "cpu" and self._inside_layers(unit)
            if stored is None or not reuse or stored.dtype is self._dtypes[name]:
                continue
            key = (name.removeprefix(unit), self._reader.shapes[name], self._dtypes[name])
            if key not in self._buffers:
                self._buffers[key] = torch.empty(key[1], dtype=key[2])
            found[name] = self._buffers[key].copy_(stored.read())
        found |= self._reader.read([name for name in whole if name not in found], self._dtypes, self._device)
        return found | {name: LazyExperts(self._reader, name, self._dtypes[name], self._device) for name in lazy}

    def _unload(self, unit: str, module: nn.Module, arrive: Arrive | None) -> None:
        """Put placeholders in the place of a unit's weights."""
        for name in self.units[unit]:
            owner, attribute = _owner(module, unit, name)
            owner.__dict__.pop(attribute, None)
            owner._parameters[attribute] = nn.Parameter(self._placeholders[name], requires_grad=False)
        if arrive is None:
            self.drop(unit)

    def _linear_in_blocks(self, unit: str, module: nn.Linear, arrive: Arrive | None, x: torch.Tensor) -> torch.Tensor:
        if arrive is not None:
            arrive(unit)
        stored = self._reader.as_stored(f"{unit}.weight")
        with _needed_for(unit):
            weight = self._one(f"{unit}.weight") if stored is None else stored.read()
        rows = max(1024, _BLOCK_BYTES // (weight.shape[1] * self._dtype.itemsize) // 1024 * 1024)
        out = x.new_empty((*x.shape[:-1], len(weight)))
        for first in range(0, len(weight), rows):
            block = weight[first : first + rows].to(self._device, self._dtype)
            out[..., first : first + rows] = x @ block.T
            if stored is not None and len(stored.entries) == 1:
                entry = stored.entries[0]
                start = entry.start + first * weight.stride(0) * weight.itemsize
                self._source.release(entry.shard, start, start + len(block) * weight.stride(0) * weight.itemsize)
        if module.bias is not None:
            bias = f"{unit}.bias"
            out = out + (self._resident[bias] if bias in self._resident else self._one(bias))
        if arrive is None:
            self.drop(unit)
        return out

    def _one(self, name: str) -> torch.Tensor:
        return self._reader.read([name], self._dtypes, self._device)[name]

    def _looked_up(
        self,
        unit: str,
        module: Any,
        forward: Callable[..., Any],
        arrive: Arrive | None,
        ids: torch.Tensor,
    ) -> Any:
        """Run a lookup with a table of only the rows that it looks up."""
        if arrive is not None:
            arrive(unit)
        name = f"{unit}.weight"
        stored = self._reader.as_stored(name)
        assert stored is not None
        needed, numbers = ids.unique(return_inverse=True)
        with _needed_for(unit):
            rows = stored.read()[needed.cpu()].to(self._device, self._dtypes[name])
        padding, module.padding_idx = module.padding_idx, None  # it would be an index into the whole table
        try:
            module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            return forward(numbers)
        finally:
            module.padding_idx = padding
            self._unload(unit, module, arrive)


@contextlib.contextmanager
def _needed_for(unit: str) -> Iterator[None]:
    """Name the unit in the error of a tensor that cannot be read."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error} (needed for {unit})") from error


def _put(network: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer of a network."""
    owner, attribute = _owner(network, "", name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _takes_ids(module: nn.Module) -> bool:
    """Whether a module is a lookup of given ids; others, as of learned positions, find ids by themselves."""
    return isinstance(module, nn.Embedding) and list(inspect.signature(module.forward).parameters) in (
        ["input"],
        ["input_ids"],
    )


def _owner(module: nn.Module, unit: str, name: str) -> tuple[nn.Module, str]:
    """The module inside a unit that has a parameter, and the parameter's name there."""
    inside = name.removeprefix(f"{unit}.") if unit else name
    path, _, attribute = inside.rpartition(".")
    return module.get_submodule(path) if path else module, attribute
