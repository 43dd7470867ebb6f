"""The stacked weights of a layer's experts, of which each is read from the checkpoint when it is used."""

from __future__ import annotations

from typing import Any

import torch

from .parameter_reader import ParameterReader


class LazyExperts:
    """Stands for a parameter `[experts, ...]`: `self[k]` reads expert k. A class that uses all at once gets them all."""

    def __init__(self, reader: ParameterReader, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self._reader, self._name, self._read_dtype = reader, name, dtype
        self.dtype, self.device = dtype, device
        self.shape = torch.Size(reader.shapes[name])

    def in_dtype(self, dtype: torch.dtype) -> LazyExperts:
        """The same weights, cast once more."""
        other = LazyExperts(self._reader, self._name, self._read_dtype, self.device)
        other.dtype = dtype
        return other

    def __getitem__(self, index: Any) -> torch.Tensor:
        number = index.ndim == 0 if isinstance(index, torch.Tensor) else isinstance(index, int)
        if number:
            return self._reader.read_expert(self._name, int(index), self._read_dtype, self.device).to(self.dtype)
        return self._whole()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._whole(), name)

    def _whole(self) -> torch.Tensor:
        return self._reader.read([self._name], {self._name: self._read_dtype}, self.device)[self._name].to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(value: Any) -> Any:
            return value._whole() if isinstance(value, LazyExperts) else value

        return func(*map(whole, args), **{name: whole(value) for name, value in (kwargs or {}).items()})
