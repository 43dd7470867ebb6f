"""The checkpoint reader: reads single tensors of a safetensors checkpoint, local or remote, without reading the others.

A safetensors file is an 8-byte length, a JSON header with the dtype, shape and byte range of each tensor, and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"), so each tensor can be read separately.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import torch
from pydantic import Field

from ..errors import ModelError, foreign_errors
from ..schema import Record, shortened, validate
from .sources import Source

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LARGEST_REQUEST = 64 << 20  # bytes
_SAMPLE = 1 << 10  # bytes of one sample of a tensor in its fingerprint
_BRIDGED_GAP = 256  # bytes between two tensors that are read too, to save a request


@dataclass(frozen=True)
class Entry:
    """A tensor's location and type: its file (shard), dtype as safetensors names it, shape, and bytes `[start, stop)` of the file."""

    shard: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return _DTYPES[self.dtype_name]

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return self.stop - self.start


class Checkpoint:
    """The tensors of a checkpoint folder by name; headers are read once, tensors on access. Iterating yields the names.

    Raises:
        ModelError: no safetensors weights, or a damaged index or header; the message names the file.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._headers: dict[str, dict[str, Entry]] = {}
        # A folder may have both. Transformers reads the single file then, and both engines must read the same weights.
        if source.exists(SINGLE):
            self._shard_of = dict.fromkeys(self._header(SINGLE), SINGLE)
        elif source.exists(INDEX):
            self._shard_of = self._read_index()
        else:
            raise ModelError(
                f"{source.where('')} contains no safetensors weights ({SINGLE} or {INDEX}): convert the checkpoint with "
                "`save_pretrained`, which writes safetensors"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def total_bytes(self) -> int:
        """Total size in bytes of all files with weights."""
        return sum(self.source.size(shard) for shard in set(self._shard_of.values()))

    def entries(self, names: Iterable[str]) -> dict[str, Entry]:
        """Return the locations of the named tensors, which must exist; reads only the headers of their files.

        Raises:
            ModelError: a header is damaged, or lacks a tensor that the index maps to it.
        """
        names = list(names)
        found: dict[str, Entry] = {}
        for shard in dict.fromkeys(self._shard_of[name] for name in names):
            header = self._header(shard)
            for name in names:
                if self._shard_of[name] == shard:
                    if name not in header:
                        raise ModelError(f"{self.source.where(shard)} lacks tensor {name!r}, which {INDEX} maps to it")
                    found[name] = header[name]
        return found

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read the named tensors, which must exist, into memory; adjacent tensors of a file are read in one request."""
        entries = self.entries(names)
        tensors: dict[str, torch.Tensor] = {}
        for group in _neighbours(entries):
            first, last = entries[group[0]], entries[group[-1]]
            data = bytearray(self.source.read(first.shard, first.start, last.stop))
            for name in group:
                entry = entries[name]
                begin = entry.start - first.start
                if entry.bytes:
                    flat = torch.frombuffer(memoryview(data)[begin : begin + entry.bytes], dtype=torch.uint8)
                    # A copy is aligned, and lets the request's buffer be freed.
                    tensors[name] = flat.clone().view(entry.dtype).view(entry.shape)
                else:
                    tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
        return {name: tensors[name] for name in entries}

    def _read_index(self) -> dict[str, str]:
        where = self.source.where(INDEX)
        text = self.source.read(INDEX, 0, self.source.size(INDEX))
        with foreign_errors(ModelError, f"{where} is not a safetensors index", "Fetch the checkpoint again"):
            shard_of = dict(json.loads(text)["weight_map"])
            if not all(
                isinstance(shard, str) and "/" not in shard and "\\" not in shard for shard in shard_of.values()
            ):
                raise ValueError("weight_map must name files of this folder")
        missing = sorted(shard for shard in set(shard_of.values()) if not self.source.exists(shard))
        if missing:
            raise ModelError(
                f"{where} names {missing[0]}, which is missing ({len(missing)} shards in all): fetch it again"
            )
        return shard_of

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype. On a local disk it is memory-mapped: changing it does not change the file.

        Raises:
            ModelError: the checkpoint has no tensor of that name, or its file cannot be read.
        """
        if name not in self._shard_of:
            raise ModelError(
                f"{self.source.where('')} has no tensor {name!r}: is it a checkpoint of another architecture?"
            )
        entry = self.entries([name])[name]
        mapped = self.source.map(entry.shard)
        # NumPy and Numba need aligned elements (addresses that are multiples of the element size); a copy is aligned.
        if mapped is None or not entry.bytes or entry.start % entry.dtype.itemsize:
            return self.read([name])[name]
        if entry.stop > len(mapped):  # the header was read before the file was cut
            raise ModelError(
                f"{self.source.where(entry.shard)} is cut short: tensor {name!r} ends at byte {entry.stop}, the file at {len(mapped)}. "
                "Fetch it again"
            )
        count = prod(entry.shape)
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)

    def release(self) -> None:
        """Release the memory of mapped tensors; they are read from disk again when they are next used."""
        for shard in self._headers:
            self.source.release(shard, 0, self.source.size(shard))

    def _header(self, shard: str) -> dict[str, Entry]:
        """Return the header of a shard, checked against the file's size."""
        if shard not in self._headers:
            self._headers[shard] = self._read_header(shard)
        return self._headers[shard]

    def _read_header(self, shard: str) -> dict[str, Entry]:
        where, size = self.source.where(shard), self.source.size(shard)
        if size < 8:
            raise ModelError(f"{where} is cut short: {size} bytes are not a safetensors file. Fetch it again")
        length = int.from_bytes(self.source.read(shard, 0, 8), "little")
        if length > min(_LARGEST_HEADER, size - 8):
            raise ModelError(
                f"{where} is damaged or not a safetensors file: its header claims {length} bytes of {size}. Fetch it again"
            )
        return parse_header(self.source.read(shard, 8, 8 + length), shard, where, size)[0]


def parse_header(text: bytes, shard: str, where: str, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse a safetensors header into tensor entries by name and metadata, and check it against the file's size.

    Args:
        text: the JSON header, without its 8-byte length.
        shard: the file's name, for the entries.
        where: its path or URL, for error messages.
        size: its size in bytes.

    Raises:
        ModelError: the header is damaged; the message names the file, and the tensor whose offsets are impossible.
    """
    with foreign_errors(ModelError, f"{where} has a damaged header", "Fetch the file again"):
        header = json.loads(text, object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not a JSON object")
    entries: dict[str, Entry] = {}
    data = 8 + len(text)
    for name, fields in header.items():
        record = validate(_TensorRecord, fields, f"tensor {shortened(name)} of {where}", ModelError)
        dtype, shape, (start, stop) = record.dtype, tuple(record.shape), record.data_offsets
        if dtype not in _DTYPES:
            raise ModelError(f"tensor {name!r} of {where} has dtype {shortened(dtype)}, which is not supported here")
        wanted = prod(shape) * _DTYPES[dtype].itemsize
        if not 0 <= start <= stop or stop - start != wanted:
            raise ModelError(
                f"tensor {name!r} of {where}: {dtype} {list(shape)} is {wanted} bytes, but its header gives [{start}, {stop})"
            )
        if data + stop > size:
            raise ModelError(
                f"{where} is cut short: tensor {name!r} ends at byte {data + stop}, the file at {size}. Fetch it again"
            )
        entries[name] = Entry(shard, dtype, shape, data + start, data + stop)
    end = data
    for name, entry in sorted(entries.items(), key=lambda each: (each[1].start, each[1].stop)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise ModelError(
                f"tensor {shortened(name)} of {where} {kind} (bytes {end} and {entry.start}). Fetch the file again"
            )
        end = entry.stop
    return entries, metadata


class _TensorRecord(Record):
    """One tensor in a safetensors header."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, lt=1 << 48)]] = Field(max_length=64)
    data_offsets: tuple[Annotated[int, Field(ge=0, lt=1 << 62)], Annotated[int, Field(ge=0, lt=1 << 62)]] = Field(
        strict=False
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; ValueError if a name occurs twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _neighbours(entries: dict[str, Entry]) -> Iterator[list[str]]:
    """Yield groups of tensors to read in one request: adjacent tensors of one shard, limited in total size."""
    group: list[str] = []
    for name in sorted(entries, key=lambda name: (entries[name].shard, entries[name].start, entries[name].stop)):
        entry = entries[name]
        if group:
            first, last = entries[group[0]], entries[group[-1]]
            near = entry.shard == last.shard and entry.start - last.stop <= _BRIDGED_GAP
            if not near or entry.stop - first.start > _LARGEST_REQUEST:
                yield group
                group = []
        group.append(name)
    if group:
        yield group
