"""Prompts on disk: a JSON file that a person can read and edit, and a safetensors file next to it for the rows. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..atomic_write import atomic_write
from ..errors import PromptError
from ..schema import Record, read_json, validate

FORMAT = "workbench-prompt-1"
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
    """The JSON file; `tensors` names the safetensors file in the same folder."""

    format: Literal["workbench-prompt-1"]
    input_ids: list[Index]
    embedding_ranges: list[Pair] = Field(default=[])
    spans: list[SpanRecord] = Field(default=[])
    tensors: str | None = None


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
    """Write `path` (JSON) and, if the prompt has tensors, a file with the suffix .safetensors next to it. Both writes are atomic.

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
    rows = path.with_suffix(".safetensors")
    record = {"format": FORMAT, **{name: value for name, value in fields.items() if value or name != "spans"}}
    if named:
        record["tensors"] = rows.name
    try:
        if named:
            # safetensors' save_file would create a file that only its owner can read.
            atomic_write(rows, save(named, metadata={"format": FORMAT}))
        atomic_write(path, _one_line_per_field(record).encode())
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise PromptError(f"the prompt cannot be written to {path}: {error}") from error


def read_prompt(path: str | Path) -> StoredPrompt:
    """Read the JSON file that `write_prompt` wrote, and the tensors next to it.

    Raises:
        PromptError: a file cannot be read, or its contents have the wrong form; the message names the file and the fault.
    """
    path = Path(path)
    value = read_json(path, "a prompt", PromptError)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = str(value.get("format"))[:40] if isinstance(value, dict) else type(value).__name__
        raise PromptError(f"{path} is not a prompt of this version ({FORMAT}): found {found}")
    record = validate(PromptRecord, value, path, PromptError)
    tensors = _tensors(path, record.tensors)
    return StoredPrompt(
        record.input_ids,
        [(start, stop) for start, stop in record.embedding_ranges],
        [span.model_dump(exclude_none=True) for span in record.spans],
        _numbered(tensors, "item", path),
        _numbered(tensors, "deepstack", path),
        tensors.get("position_ids"),
    )


def _tensors(path: Path, name: str | None) -> dict[str, torch.Tensor]:
    if name is None:
        return {}
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise PromptError(f"{path}: tensors must name a .safetensors file in the same folder, not {name[:80]!r}")
    try:
        return load_file(path.with_name(name))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PromptError(
            f"the rows of {path} cannot be read from {path.with_name(name)}: {error}. Copy both files"
        ) from error


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
