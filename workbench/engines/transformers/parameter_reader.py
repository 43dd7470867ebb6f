"""Reads the parameters of a Transformers model from a checkpoint one by one, by the rules of Transformers' own loading.

Names and layouts in a checkpoint may differ from the model's: tensors are renamed, split, joined, or stacked from one per expert.
Transformers' own table of these conversions is applied here, to one parameter at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ModelError
from ...models.stored_tensor import StoredTensor


class NotStreamable(Exception):
    """The weights of a model cannot be read one by one; the message says why."""


@dataclass
class _Conversion:
    """How tensors of the checkpoint become one or more parameters.

    Attributes:
        first: name of the first parameter.
        converter: Transformers' converter; None if the parameter is one tensor as it is stored.
        sources: for each pattern of the converter the names of the tensors in the checkpoint.
    """

    first: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The tensors of the checkpoint."""
        return [name for names in self.sources.values() for name in names]

    def apply(self, network: Any, tensors: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The parameters by name, from the tensors of each pattern."""
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return {self.first: tensor}
        converter = copy.deepcopy(self.converter)
        converter.collected_tensors = dict(tensors)
        made = converter.convert(self.first, model=network, config=network.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


class ParameterReader:
    """The parameters and persistent buffers of a model, by their names in it.

    Args:
        network: Transformers' model, with its parameters on the meta device.
        stored: the tensors of the checkpoint by name.
        model: its name, for messages.

    Raises:
        ModelError: tensors are missing, or have shapes that do not fit.
        NotStreamable: the checkpoint lacks parameters that it may lack: Transformers fills them.
    """

    def __init__(self, network: Any, stored: Mapping[str, StoredTensor], model: str) -> None:
        self._network, self._stored = network, stored
        self.shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
        self._conversion_of: dict[str, _Conversion] = {}
        faults = []
        for conversion in _conversions(network, stored, set(self.shapes)):
            for name, shape in self._shapes_of(conversion).items():
                if name in self.shapes:
                    self._conversion_of[name] = conversion
                    if shape != self.shapes[name]:
                        faults.append(f"{name} is {shape} in the checkpoint and {self.shapes[name]} in the model")
        self._same_as = self._tied(network)
        missing = [name for name in self.shapes if self._same_as.get(name, name) not in self._conversion_of]
        ignored = getattr(network, "_keys_to_ignore_on_load_missing", None) or ()
        faults += [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
        if faults:
            raise ModelError(
                f"the checkpoint of {model!r} lacks {len(faults)} tensors that {type(network).__name__} needs, or has them in another "
                f"shape: {', '.join(faults[:3])}{' ...' * (len(faults) > 3)}. Fetch the checkpoint again"
            )
        if missing:
            raise NotStreamable(f"Transformers fills {missing[0]}, which is not in the checkpoint")

    def sources(self, names: Sequence[str]) -> list[StoredTensor]:
        """The tensors of the checkpoint from which parameters are made, each once."""
        found = dict.fromkeys(source for name in names for source in self._conversion(name).names)
        return [self._stored[name] for name in found]

    def as_stored(self, name: str) -> StoredTensor | None:
        """The tensor that is a parameter as it is stored; None if a conversion makes the parameter."""
        conversion = self._conversion(name)
        return self._stored[conversion.names[0]] if conversion.converter is None else None

    def read(
        self, names: Sequence[str], dtypes: Mapping[str, torch.dtype], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Read parameters in the given dtypes. Tensors are cast before they are converted, as Transformers does."""
        made: dict[int, dict[str, torch.Tensor]] = {}
        for name in names:
            conversion = self._conversion(name)
            if id(conversion) not in made:
                tensors = {
                    pattern: [_moved(self._stored[each].read(), device, dtypes[name]) for each in sources]
                    for pattern, sources in conversion.sources.items()
                }
                made[id(conversion)] = conversion.apply(self._network, tensors)
        return {name: made[id(self._conversion(name))][self._same_as.get(name, name)] for name in names}

    def experts(self, name: str) -> int:
        """The number of experts in a parameter that stacks their weights, if each can be read alone; else 0."""
        conversion, shape = self._conversion(name), self.shapes[name]
        if len(shape) != 3 or "expert" not in name:
            return 0
        if conversion.converter is None:
            return shape[0]
        steps = {type(step).__name__: step for step in conversion.converter.operations}
        alone = set(steps) <= {"MergeModulelist", "Concatenate"} and "MergeModulelist" in steps
        if not alone or steps["MergeModulelist"].dim != 0 or ("Concatenate" in steps and steps["Concatenate"].dim == 0):
            return 0
        return shape[0] if all(len(names) == shape[0] for names in conversion.sources.values()) else 0

    def read_expert(self, name: str, expert: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """One expert's part of a parameter for which `experts` is not 0."""
        conversion = self._conversion(name)
        if conversion.converter is None:
            return _moved(self._stored[conversion.names[0]].read()[expert], device, dtype)
        tensors = {
            pattern: [_moved(self._stored[names[expert]].read(), device, dtype)]
            for pattern, names in conversion.sources.items()
        }
        return conversion.apply(self._network, tensors)[name][0]

    def _conversion(self, name: str) -> _Conversion:
        return self._conversion_of[self._same_as.get(name, name)]

    def _shapes_of(self, conversion: _Conversion) -> dict[str, tuple[int, ...]]:
        """The shapes of what a conversion makes, found on the meta device."""
        meta = {
            pattern: [torch.empty(self._stored[name].shape, device="meta") for name in names]
            for pattern, names in conversion.sources.items()
        }
        try:
            return {name: tuple(each.shape) for name, each in conversion.apply(self._network, meta).items()}
        except Exception as error:  # whatever a conversion raises for tensors that do not fit together
            raise ModelError(
                f"{conversion.first} cannot be made from {', '.join(conversion.names[:3])}: {error}. Fetch the checkpoint again"
            ) from error

    def _tied(self, network: Any) -> dict[str, str]:
        """For tied parameters that are stored once: the name of the one that is stored."""
        same: dict[str, str] = {}
        for target, source in (getattr(network, "all_tied_weights_keys", None) or {}).items():
            if target not in self._conversion_of and source in self._conversion_of:
                same[target] = source
            elif source not in self._conversion_of and target in self._conversion_of:
                same[source] = target
        return same


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Move and cast a tensor in the order that moves fewer bytes; torch would always cast first."""
    return tensor.to(device).to(dtype) if tensor.dtype.itemsize < dtype.itemsize else tensor.to(dtype).to(device)


def _conversions(network: Any, stored: Mapping[str, StoredTensor], wanted: set[str]) -> Iterator[_Conversion]:
    """Match the names of a checkpoint with a model's, as `transformers.core_model_loading` does."""
    from transformers import conversion_mapping, core_model_loading
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = conversion_mapping.get_model_conversion_mapping(network)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = dict.fromkeys(wanted, True), network.base_model_prefix
    found: dict[str, _Conversion] = {}
    for name in sorted(stored, key=core_model_loading.dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if renamed not in state:
            continue  # a tensor that this class does not use
        conversion = found.setdefault(renamed, _Conversion(renamed, pattern and converter_of[pattern]))
        conversion.sources.setdefault(pattern or name, []).append(name)
        if conversion.converter is None and len(conversion.names) > 1:
            raise ModelError(f"the checkpoint has {renamed} twice: as {' and as '.join(conversion.names)}")
    yield from found.values()
