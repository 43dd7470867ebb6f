"""Read tensors one at a time from a safetensors checkpoint, one file or sharded, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelError

_SAMPLE = 1 << 10


class Weights:
    """The tensors of a checkpoint folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        self.folder = folder
        if index.exists():
            try:
                self._file_of = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) and Path(file).name == file for file in self._file_of.values()):
                    raise ValueError("weight_map must name files of this folder")
            except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
                raise ModelError(f"{index} is not a safetensors index: {error}. Fetch the checkpoint again") from error
            missing = sorted({name for name in self._file_of.values() if not (folder / name).exists()})
            if missing:
                raise ModelError(
                    f"{index} names {missing[0]}, which is missing ({len(missing)} shards are): fetch it again"
                )
        elif single.exists():
            with self._open(single.name) as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise ModelError(
                f"{folder} holds no safetensors weights (model.safetensors or model.safetensors.index.json). Convert .bin "
                "checkpoints with `save_pretrained`, which writes safetensors; pickled files are not loaded"
            )

    def _open(self, name: str):
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder / name} cannot be read ({error}): it is damaged, fetch it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def fingerprints(self) -> Iterator[bytes]:
        """Of every tensor, by name: name, type, shape, and 1 KiB of its bytes at the beginning, in the middle and at the end."""
        found: dict[str, bytes] = {}
        for file in sorted(set(self._file_of.values())):
            path = self.folder / file
            self._open(file)  # checks the header
            try:
                with open(path, "rb") as opened:
                    length = int.from_bytes(opened.read(8), "little")
                    header = json.loads(opened.read(length))
                    for name, entry in header.items():
                        if name == "__metadata__":
                            continue
                        first, last = entry["data_offsets"]
                        size = min(_SAMPLE, last - first)
                        samples = [repr((name, entry["dtype"], entry["shape"])).encode()]
                        for start in (first, (first + last - size) // 2, last - size):
                            opened.seek(8 + length + start)
                            samples.append(opened.read(size))
                        found[name] = b"".join(samples)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{path} cannot be read ({error}): it is damaged, fetch it again") from error
        return (found[name] for name in sorted(found))

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name, in its stored dtype."""
        if name not in self._file_of:
            raise ModelError(f"{self.folder} has no tensor {name!r}: is it a checkpoint of another architecture?")
        with self._open(self._file_of[name]) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise ModelError(
                    f"tensor {name!r} of {self.folder / self._file_of[name]} cannot be read: {error}"
                ) from error
