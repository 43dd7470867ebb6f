"""Prompts on disk: a JSON file that a person can read and edit, and a safetensors file beside it for the rows. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .errors import PromptError
from .prompt import Prompt, Span
from .whole_files import write_whole

FORMAT = "workbench-prompt-1"
_FIELDS = {"format", "input_ids", "embedding_ranges", "spans", "tensors"}
_SPAN_FIELDS = {"modality", "grid", "attention", "label", "block"}
_LARGEST_JSON = 64 << 20


def save_prompt(prompt: Prompt, path: str | Path) -> None:
    """Write `path` (JSON) and, where the prompt has tensors, `path` with the suffix .safetensors.

    Raises:
        PromptError: a prompt that is no plain Prompt, or a place that cannot be written.
    """
    path = Path(path)
    if type(prompt) is not Prompt:
        raise PromptError(
            f"a {type(prompt).__name__} cannot be saved: processed pictures belong to one model's processor"
        )
    if path.suffix == ".safetensors":
        raise PromptError(f"{path}: name the JSON file, the rows go beside it")
    named: dict[str, torch.Tensor] = {}
    for kind, several in (("item", prompt.input_embeddings), ("deepstack", prompt.deepstack)):
        for number, tensor in enumerate(several):
            if not isinstance(tensor, torch.Tensor):
                raise PromptError(f"{kind} {number} is a {type(tensor).__name__}, not a tensor: it cannot be saved")
            named[f"{kind}.{number}"] = tensor.detach().cpu().contiguous().clone()
    if prompt.position_ids is not None:
        named["position_ids"] = prompt.position_ids.detach().cpu().contiguous()
    beside = path.with_suffix(".safetensors")
    record: dict[str, Any] = {
        "format": FORMAT,
        "input_ids": list(prompt.input_ids),
        "embedding_ranges": [list(pair) for pair in prompt.embedding_ranges],
    }
    if prompt.spans:
        record["spans"] = [_span_record(span) for span in prompt.spans]
    if named:
        record["tensors"] = beside.name
    try:
        if named:
            # save_file would make a file that others cannot read beside one that they can.
            write_whole(beside, save(named, metadata={"format": FORMAT}))
        write_whole(path, _layout(record).encode())
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise PromptError(f"the prompt cannot be written to {path}: {error}") from error


def load_prompt(path: str | Path) -> Prompt:
    """Read what `save_prompt` wrote. The ranges may have been edited: a prompt may be wrong, a file may not.

    Raises:
        PromptError: what in which file is not as it should be.
    """
    path = Path(path)
    record = _read(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = str(record.get("format"))[:40] if isinstance(record, dict) else type(record).__name__
        raise PromptError(f"{path} is no prompt of this version ({FORMAT}): found {found}")
    unknown = sorted(set(record) - _FIELDS)
    if unknown:
        raise PromptError(
            f"{path} has unknown fields {', '.join(map(repr, unknown))}: known are {', '.join(sorted(_FIELDS))}"
        )
    ids, pairs = record.get("input_ids"), record.get("embedding_ranges", [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise PromptError(f"{path}: input_ids must be a list of integers")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) for pair in pairs
    ):
        raise PromptError(f"{path}: embedding_ranges must be a list of pairs [start, stop] of integers")
    if any(abs(number) >= 2**62 for number in [*ids, *(end for pair in pairs for end in pair)]):
        raise PromptError(f"{path}: a token id or position is larger than any there is")
    spans = record.get("spans", [])
    if not isinstance(spans, list):
        raise PromptError(f"{path}: spans must be a list")
    tensors = _tensors(path, record.get("tensors"))
    return Prompt(
        ids,
        _numbered(tensors, "item", path),
        [(start, stop) for start, stop in pairs],
        [_span(span, number, path) for number, span in enumerate(spans)],
        tensors.pop("position_ids", None),
        _numbered(tensors, "deepstack", path),
    )


def _read(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise PromptError(
                f"{path} is {size / 2**20:.0f} MiB of JSON: no prompt is that long; name the JSON file of a saved prompt"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except PromptError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{path} cannot be read as a prompt: {error}") from error


def _tensors(path: Path, name: Any) -> dict[str, torch.Tensor]:
    if name is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise PromptError(f"{path}: tensors must name a .safetensors file in the same folder, not {str(name)[:80]!r}")
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


def _span_record(span: Span) -> dict[str, Any]:
    record: dict[str, Any] = {"modality": span.modality, "attention": span.attention}
    if span.grid is not None:
        record["grid"] = list(span.grid)
    if span.label:
        record["label"] = span.label
    if span.block is not None:
        record["block"] = list(span.block)
    return record


def _span(record: Any, number: int, path: Path) -> Span:
    where = f"{path}: spans[{number}]"
    if not isinstance(record, dict) or set(record) - _SPAN_FIELDS:
        raise PromptError(f"{where} must be an object with some of {', '.join(sorted(_SPAN_FIELDS))}")
    for name in ("modality", "attention", "label"):
        if not isinstance(record.get(name, ""), str):
            raise PromptError(f"{where}.{name} must be a string")
    for name in ("grid", "block"):
        value = record.get(name)
        if value is not None and not (isinstance(value, list) and all(type(each) is int for each in value)):
            raise PromptError(f"{where}.{name} must be a list of integers")
    if record.get("block") is not None and len(record["block"]) != 2:
        raise PromptError(f"{where}.block must be [start, stop]")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    return Span(**values)


def _layout(record: Mapping[str, Any]) -> str:
    """JSON with a line a field: ids do not fill a thousand lines."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
