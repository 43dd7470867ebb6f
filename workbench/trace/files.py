"""Traces on disk, as safetensors files: written tap by tap while the engine runs, read tap by tap on access."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..atomic_write import AtomicFile
from ..checksums import checksum
from ..errors import TraceError, reason
from .provenance import check_provenance

FORMAT = "workbench-trace-3"
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class TraceWriter:
    """Writes one trace file. Every tap's offset is known in advance, so taps may arrive in any order and none is buffered.

    The file is renamed to `path` when all taps are written (`AtomicFile`); an interrupted run leaves no file. Checksums (CRC-32 per
    tap, XXH3 of the metadata) detect damage, not tampering: anyone who can write the file can write them too.

        with TraceWriter(path, shapes, dtype, positions, provenance) as writer:
            writer.write("embed", state)

    Args:
        shapes: `{tap: (positions, width)}` in the order in which taps are computed.
        positions, provenance: as in `Trace`.

    Raises:
        TraceError: the file cannot be written, or, at the end of the `with` block, a tap is missing.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        positions: torch.Tensor,
        provenance: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self.shapes, self.dtype = dict(shapes), dtype
        self._positions, self._provenance = positions, provenance
        self._sums = dict.fromkeys(self.shapes, "0" * 8)
        self._offsets, end = {}, 0
        for tap, (rows, width) in self.shapes.items():
            self._offsets[tap] = end
            end += rows * width * dtype.itemsize
        self._missing = set(self.shapes)
        self._begin = len(self._header())
        try:
            self._new = AtomicFile(self.path)
            self._file = self._new.file
            try:
                self._file.truncate(self._begin + end)
            except OSError:
                self._new.discard()
                raise
        except (OSError, ValueError) as error:
            raise TraceError(f"the trace cannot be written to {path}: {error}") from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        complete = kind is None and not self._missing
        try:
            if complete:
                self._file.seek(0)
                self._file.write(self._header())
                self._new.commit()
        except OSError as problem:
            raise TraceError(f"the trace cannot be written to {self.path}: {problem}") from problem
        finally:
            self._new.discard()
        if kind is None and not complete:
            raise TraceError(f"{self.path} was not written: the engine gave no {', '.join(sorted(self._missing))}")

    def write(self, tap: str, state: torch.Tensor) -> None:
        """Write a tap's states `[positions, width]`.

        Raises:
            TraceError: the shape or dtype is not the planned one, or the disk is full.
        """
        if tuple(state.shape) != self.shapes[tap] or state.dtype != self.dtype:
            raise TraceError(
                f"tap {tap!r} is {state.dtype} {tuple(state.shape)}; the file was planned for {self.dtype} {self.shapes[tap]}"
            )
        content = raw_bytes(state.detach().cpu())
        try:
            self._file.seek(self._begin + self._offsets[tap])
            self._file.write(content)
        except OSError as error:
            raise TraceError(f"the trace cannot be written to {self.path}: {error}") from error
        self._sums[tap] = f"{zlib.crc32(content):08x}"
        self._missing.discard(tap)

    def _header(self) -> bytes:
        """Return the safetensors header; its length does not depend on the checksums."""
        metadata = {
            "format": FORMAT,
            "positions": json.dumps(self._positions.tolist()),
            "taps": json.dumps(list(self.shapes)),
            "crc32": json.dumps(self._sums),
            "provenance": json.dumps(self._provenance),
        }
        entries: dict[str, Any] = {"__metadata__": {**metadata, "checksum": metadata_checksum(metadata)}}
        for tap, (rows, width) in self.shapes.items():
            start = self._offsets[tap]
            stop = start + rows * width * self.dtype.itemsize
            name = _NAMES[str(self.dtype).removeprefix("torch.")]
            entries[tap] = {"dtype": name, "shape": [rows, width], "data_offsets": [start, stop]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class StoredStates(Mapping[str, torch.Tensor]):
    """The states of a trace file, a mapping by tap name: each is read, and its checksum verified on first access.

    Raises:
        TraceError: the file is not a trace, or is damaged; on access, the states of that tap are damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
            metadata = self._file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = str(metadata.get("format"))[:40]
                raise TraceError(
                    f"{path} is not a trace of this version (its format is {found}, not {FORMAT}): record it again"
                )
            check_metadata(metadata, path)
            self.provenance = check_provenance(json.loads(metadata["provenance"]), path)
            self.taps: list[str] = json.loads(metadata["taps"])
            kept, sums = json.loads(metadata["positions"]), json.loads(metadata["crc32"])
            names = set(self._file.keys())
            shapes = {name: self._file.get_slice(name) for name in names}
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"{path} cannot be read as a trace: {reason(error)}. Copy it again, or record it again"
            ) from error
        tokens = self.provenance["tokens"]
        if not isinstance(kept, list) or not all(type(each) is int and 0 <= each < tokens for each in kept):
            raise TraceError(f"{path}: its positions are not a list of integers within {tokens} tokens")
        self.positions = torch.tensor(kept, dtype=torch.int64)
        if not isinstance(self.taps, list) or not all(isinstance(tap, str) for tap in self.taps):
            raise TraceError(f"{path}: its taps are not a list of names")
        if not isinstance(sums, dict) or set(self.taps) != names or set(sums) != names or len(self.taps) != len(names):
            raise TraceError(f"{path}: its list of taps, its checksums and its tensors disagree: record it again")
        self._sums = sums
        expected = _NAMES.get(self.provenance["dtype"])
        for tap, shape in shapes.items():
            if shape.get_dtype() != expected:
                raise TraceError(
                    f"{path}: tap {tap!r} is {shape.get_dtype()}, but its provenance has {self.provenance['dtype']}"
                )
            if len(shape.get_shape()) != 2 or shape.get_shape()[0] != len(kept):
                raise TraceError(f"{path}: tap {tap!r} does not have one row for each of {len(kept)} positions")
        self._shapes = {tap: tuple(shape.get_shape()) for tap, shape in shapes.items()}
        self._checked: set[str] = set()

    def __getitem__(self, tap: str) -> torch.Tensor:
        if tap not in self._sums:
            raise KeyError(tap)
        try:
            state: torch.Tensor = self._file.get_tensor(tap)
        except Exception as error:
            raise TraceError(f"tap {tap!r} of {self.path} cannot be read: {reason(error)}") from error
        if tap not in self._checked:
            found = f"{zlib.crc32(raw_bytes(state)):08x}"
            if found != self._sums[tap]:
                raise TraceError(
                    f"tap {tap!r} of {self.path} has checksum {found}, not the recorded {str(self._sums[tap])[:8]}: the file was "
                    "damaged or changed; copy it again, or record it again"
                )
            self._checked.add(tap)
        return state

    def __iter__(self) -> Iterator[str]:
        return iter(self.taps)

    def __len__(self) -> int:
        return len(self.taps)

    @property
    def nbytes(self) -> int:
        """Total bytes of all states, read or not."""
        itemsize: int = getattr(torch, self.provenance["dtype"]).itemsize
        return sum(rows * width for rows, width in self._shapes.values()) * itemsize


def readable(taps: Sequence[str], most: int = 6) -> str:
    """Format a list of taps for an error message, shortened to one line."""
    return ", ".join(taps) if len(taps) <= most else f"{', '.join(taps[: most - 1])}, ... {taps[-1]}"


def metadata_checksum(metadata: Mapping[str, str]) -> str:
    """Return the checksum of a file's metadata, without its entry "checksum"."""
    return checksum(json.dumps(sorted((name, text) for name, text in metadata.items() if name != "checksum")).encode())


def check_metadata(metadata: Mapping[str, str], path: str | Path) -> None:
    """Raise TraceError if the metadata of a file at `path` is not what its checksum was made of."""
    if metadata.get("checksum") != metadata_checksum(metadata):
        raise TraceError(
            f"the metadata of {path} (positions, taps, provenance) was damaged or changed: copy it again, or record it again"
        )


def raw_bytes(state: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy if it is contiguous."""
    flat: Any = state.contiguous().view(torch.uint8).numpy().reshape(-1)
    return memoryview(flat)
