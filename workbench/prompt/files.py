"""Prompts on disk: a JSON file that a person can read and edit, and a safetensors file next to it for the rows. Never pickle.

The rows' file is named after its content, and the JSON file, which names it with its checksum, is replaced last: whatever moment a
writer is killed at, the JSON file names complete rows, the old ones or the new ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save

from ..atomic_write import atomic_write, one_writer
from ..checksums import checksum
from ..errors import PromptError, foreign_errors
from ..schema import Record, read_json, shortened, validate

FORMAT = "workbench-prompt-1"
_TRIES = 5
_LIMIT = 2**62
Index = Annotated[int, Field(gt=-_LIMIT, lt=_LIMIT)]
Pair = Annotated[list[Index], Field(min_length=2, max_length=2)]


class SpanRecord(Record):
    """A span in the JSON file; fields as in `workbench.Span`."""

    modality: str = "image"
    grid: list[Index] | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    label: str = ""
    block: Pair | None = None


class PromptRecord(Record):
    """The JSON file; `tensors` names the safetensors file in the same folder, `tensors_checksum` is of its bytes."""

    format: Literal["workbench-prompt-1"]
    input_ids: list[Index]
    embedding_ranges: list[Pair] = Field(default=[])
    spans: list[SpanRecord] = Field(default=[])
    tensors: str | None = Field(default=None, max_length=255)
    tensors_checksum: str | None = None


@dataclass(frozen=True)
class StoredPrompt:
    """The contents of a prompt's files; fields as in `workbench.Prompt`, not checked against each other."""

    input_ids: list[int]
    embedding_ranges: list[tuple[int, int]]
    spans: list[dict[str, Any]]
    items: list[torch.Tensor]
    deepstack: list[torch.Tensor]
    position_ids: torch.Tensor | None


def write_prompt(
    path: str | Path,
    fields: Mapping[str, Any],
    items: Sequence[torch.Tensor],
    deepstack: Sequence[torch.Tensor],
    position_ids: torch.Tensor | None,
) -> None:
    """Write `path` (JSON) and, if the prompt has tensors, `<name>.<checksum>.safetensors` next to it; the pair is replaced atomically.

    Rows of an earlier prompt of the same path are removed.

    Args:
        fields: JSON values: `input_ids`, `embedding_ranges`, and `spans` (left out if empty).
        items, deepstack, position_ids: as in `workbench.Prompt`.

    Raises:
        PromptError: a value that cannot be saved, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise PromptError(f"{path}: give the name of the JSON file; the rows are written next to it")
    named: dict[str, torch.Tensor] = {}
    for kind, several in (("item", items), ("deepstack", deepstack)):
        for number, tensor in enumerate(several):
            if not isinstance(tensor, torch.Tensor):
                raise PromptError(f"{kind} {number} is a {type(tensor).__name__}, not a tensor: it cannot be saved")
            named[f"{kind}.{number}"] = tensor.detach().cpu().contiguous().clone()
    if position_ids is not None:
        named["position_ids"] = position_ids.detach().cpu().contiguous()
    record = {"format": FORMAT, **{name: value for name, value in fields.items() if value or name != "spans"}}
    with foreign_errors(PromptError, f"the prompt cannot be written to {path}", "Check the folder and the disk"):
        rows: Path | None = None
        if named:
            data = save(
                named, metadata={"format": FORMAT}
            )  # save_file would create a file that only its owner can read
            record["tensors_checksum"] = checksum(data)
            rows = path.with_name(f"{path.name}.{record['tensors_checksum'][:16]}.safetensors")
            record["tensors"] = rows.name
        with one_writer(path.parent):
            if rows is not None:
                atomic_write(rows, data)
            atomic_write(path, _one_line_per_field(record).encode())
            _remove_other_rows(path, rows)


def _remove_other_rows(path: Path, current: Path | None) -> None:
    """Remove rows of earlier prompts at `path`, which its JSON file no longer names."""
    ours = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.safetensors")
    for other in path.parent.iterdir():
        if other != current and ours.fullmatch(other.name):
            other.unlink(missing_ok=True)


def read_prompt(path: str | Path) -> StoredPrompt:
    """Read the JSON file that `write_prompt` wrote, and the tensors next to it.

    Raises:
        PromptError: a file cannot be read, or its contents have the wrong form; the message names the file and the fault.
    """
    path = Path(path)
    for _ in range(_TRIES):  # another process may replace the prompt between the reading of its two files
        record = _read_record(path)
        if record.tensors is None or path.with_name(Path(record.tensors).name).exists():
            break
    tensors = _tensors(path, record)
    return StoredPrompt(
        record.input_ids,
        [(start, stop) for start, stop in record.embedding_ranges],
        [span.model_dump(exclude_none=True) for span in record.spans],
        _numbered(tensors, "item", path),
        _numbered(tensors, "deepstack", path),
        tensors.get("position_ids"),
    )


def _read_record(path: Path) -> PromptRecord:
    value = read_json(path, "a prompt", PromptError)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = str(value.get("format"))[:40] if isinstance(value, dict) else type(value).__name__
        raise PromptError(f"{path} is not a prompt of this version ({FORMAT}): found {found}")
    return validate(PromptRecord, value, path, PromptError)


def _tensors(path: Path, record: PromptRecord) -> dict[str, torch.Tensor]:
    name = record.tensors
    if name is None:
        return {}
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise PromptError(f"{path}: tensors must name a .safetensors file in the same folder, not {name[:80]!r}")
    where = f"the rows of {path} cannot be read from {path.with_name(name)}"
    with foreign_errors(PromptError, where, "Copy both files"):
        data = path.with_name(name).read_bytes()  # not mapped: a file that is cut later would crash the process
        found = checksum(data)
        if found != record.tensors_checksum:
            raise PromptError(
                f"{where}: its checksum is {found}, and the prompt names {shortened(record.tensors_checksum, 80)}: it belongs to "
                "another prompt, or is damaged. Copy both files, or save the prompt again"
            )
        return load(data)


def _numbered(tensors: Mapping[str, torch.Tensor], kind: str, path: Path) -> list[torch.Tensor]:
    names = [name for name in tensors if name.startswith(f"{kind}.")]
    expected = [f"{kind}.{number}" for number in range(len(names))]
    if set(names) != set(expected):
        raise PromptError(f"{path}: its tensors {sorted(names)} are not numbered from 0 without a gap")
    return [tensors[name] for name in expected]


def _one_line_per_field(record: Mapping[str, Any]) -> str:
    """Format a record as JSON with one line per field, so that a list of a thousand ids does not take a thousand lines."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
