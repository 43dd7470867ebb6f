"""Provenance: what produced a recorded run, so that two runs are compared only if the comparison is meaningful."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..errors import ModelError, TraceError
from ..models import Model
from ..prompt import Prompt
from ..version import __version__


def provenance_of(
    prompt: Prompt, *, engine: str, model: Model, dtype: torch.dtype, device: torch.device, words: bool = False
) -> dict[str, Any]:
    """Return the provenance of a run, a dict of JSON values.

    Args:
        words: whether to store each token's text too, for machines that do not have the model's tokenizer.
    """
    record: dict[str, Any] = {
        "engine": engine,
        "model": model.name,
        "model_digest": model.digest,
        "dtype": str(dtype).removeprefix("torch."),
        "device": _device(device),
        "prompt": prompt.digest,
        "tokens": len(prompt),
        "ranges": [list(pair) for pair in prompt.embedding_ranges],
        "modalities": [span.modality for span in prompt.spans],
        "versions": versions(),
    }
    if words:
        with contextlib.suppress(ModelError):  # a model without a tokenizer has no words
            record["words"] = model.tokens(prompt.input_ids)
    return record


def check_provenance(record: Any, path: object) -> dict[str, Any]:
    """Check a provenance that was read from the file `path`, which may come from anywhere, and return it.

    Raises:
        TraceError: a field is missing or has a wrong type or value; the message names the file and the field.
    """
    if not isinstance(record, dict):
        raise TraceError(f"{path}: its provenance is not a JSON object")
    strings = ("engine", "model", "model_digest", "dtype", "device", "prompt")
    lacking = sorted({*strings, "tokens", "ranges", "modalities", "versions"} - set(record))
    if lacking:
        raise TraceError(f"{path}: its provenance lacks {', '.join(lacking)}")
    for name in strings:
        if not isinstance(record[name], str):
            raise TraceError(f"{path}: {name} in its provenance is {record[name]!r}, not a string")
    if type(record["tokens"]) is not int or record["tokens"] < 1:
        raise TraceError(f"{path}: tokens in its provenance is {record['tokens']!r}, not a positive integer")
    pairs = record["ranges"]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) for pair in pairs
    ):
        raise TraceError(f"{path}: ranges in its provenance are not pairs of integers")
    if any(abs(end) >= 2**31 for pair in pairs for end in pair):
        raise TraceError(f"{path}: ranges in its provenance have ends beyond any prompt")
    if not isinstance(record["versions"], dict):
        raise TraceError(f"{path}: versions in its provenance is not a JSON object")
    for name in ("modalities", "words", "patches"):
        values = record.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise TraceError(f"{path}: {name} in its provenance is not a list of strings")
    if len(record.get("words", [])) not in (0, record["tokens"]):
        raise TraceError(f"{path}: {len(record['words'])} words in its provenance for {record['tokens']} tokens")
    return record


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that results depend on, by name; lmdeploy only if it is installed."""
    import numba
    import transformers

    found = {
        "workbench": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(PackageNotFoundError):
        found["lmdeploy"] = version("lmdeploy")
    return found
