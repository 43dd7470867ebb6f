"""States that other programs recorded, read from safe formats and named as taps: by rules, confirmed by the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..errors import TraceError, reason
from ..models import Model
from ..prompt import Prompt
from ..schema import shortened
from ..trace import Trace
from .identify import Identification, identify

RULES: dict[str, str] = {
    # TransformerLens
    r"(?:.*\.)?hook_embed": "embed",
    r"(?:.*\.)?blocks\.(\d+)\.hook_resid_post": "layers.{1}",
    r"(?:.*\.)?blocks\.(\d+)\.hook_attn_out": "layers.{1}.attention",
    r"(?:.*\.)?blocks\.(\d+)\.hook_mlp_out": "layers.{1}.mlp",
    r"ln_final\.hook_normalized": "norm",
    # hooks on Transformers' modules
    r"(?:.*\.)?layers\.(\d+)(?:\.output)?": "layers.{1}",
    r"(?:.*\.)?layers\.(\d+)\.self_attn(?:\.output)?": "layers.{1}.attention",
    r"(?:.*\.)?layers\.(\d+)\.mlp(?:\.output)?": "layers.{1}.mlp",
    r"(?:.*\.)?(?:embed_tokens|embed)(?:\.output)?": "embed",
    r"(?:.*\.)?norm(?:\.output)?": "norm",
    r"(?:.*\.)?(?:lm_head|logits)(?:\.output)?": "logits",
}
"""Names of other programs, as regular expressions, and the tap that each is; `{1}` is the first group."""


def read_states(path: str | Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a file or of a folder's files: `.safetensors`, `.npz`, `.npy`, and `.pt` without code.

    Leading dimensions of size 1 are dropped. A tuple of tensors, as Transformers' `output_hidden_states` gives it, becomes
    `hidden_states.0`, `.1`, ...; a tensor `[seq, layers, hidden]`, as vLLM's `extract_hidden_states` writes it, one state per layer.

    Raises:
        TraceError: a file cannot be read without running code, or has no floating-point tensors.
    """
    path = Path(path)
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if path.is_dir() and file.suffix not in _READERS:
            continue
        for name, tensor in _READERS.get(file.suffix, _unknown)(file):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                for each, state in _layers(name, _squeezed(tensor)).items():
                    if each in found:
                        raise TraceError(
                            f"{each} is in {path} twice, the second time in {file.name}: give one file, or rename it"
                        )
                    found[each] = state
    if not found:
        raise TraceError(f"{path} has no floating-point tensors of other programs' states")
    return found


def _squeezed(tensor: torch.Tensor) -> torch.Tensor:
    while tensor.ndim > 2 and len(tensor) == 1:
        tensor = tensor[0]
    return tensor


def _layers(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.ndim == 3:
        return {f"{name}.{number}": tensor[:, number] for number in range(tensor.shape[1])}
    return {name: tensor}


def _safetensors(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from load_file(file).items()
    except Exception as error:
        raise TraceError(f"{file} is not a safetensors file: {reason(error)}") from error


def _numpy(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        stored = np.load(file, allow_pickle=False)
        named = {file.stem: stored} if isinstance(stored, np.ndarray) else {key: stored[key] for key in stored.files}
        for name, array in named.items():
            if array.dtype.kind == "f":
                yield name, torch.from_numpy(array.copy())
    except Exception as error:
        raise TraceError(f"{file} is not a file of plain arrays: {reason(error)}") from error


def _torch(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TraceError(
            f"{file} is not a plain file of tensors ({reason(error, 150)}). Files that need weights_only=False can run any code: save "
            "tensors alone, or as safetensors"
        ) from error
    yield from _named("" if isinstance(stored, Mapping) else file.stem, stored)


def _named(name: str, stored: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(stored, Mapping):
        for key, value in stored.items():
            yield from _named(f"{name}.{key}" if name else str(key), value)
    elif isinstance(stored, list | tuple):
        for number, value in enumerate(stored):
            yield from _named(f"{name}.{number}", value)
    else:
        yield name, stored


def _unknown(file: Path) -> Iterator[tuple[str, Any]]:
    raise TraceError(f"{file} is none of {', '.join(_READERS)}: convert it")


_READERS = {
    ".safetensors": _safetensors,
    ".npz": _numpy,
    ".npy": _numpy,
    ".pt": _torch,
    ".pth": _torch,
}


def import_states(
    model: Model,
    prompt: Prompt,
    states: Mapping[str, torch.Tensor],
    *,
    dtype: str,
    rules: Mapping[str, str] | None = None,
    engine: str = "imported",
    device: str = "cpu",
) -> tuple[Trace, list[Identification]]:
    """Name states as taps, and make a Trace of them that `compare` takes.

    A rule names a state where one matches; the reference confirms it. A state that is another tap than its rule says is an error: it would
    be compared with the wrong one. States without a rule are named by what they equal, and left out if they equal nothing.

    Args:
        states: from `read_states`.
        dtype: what the other program computed in.
        rules: regular expressions and taps that come before `RULES`.
        engine: its name in the trace.

    Returns:
        the trace, and what became of each state; those without a row for each token are left out, and said to be.

    Raises:
        TraceError: a state is another tap than its rule says; none is of this prompt, or none could be named.
    """
    fitting, others = fitting_states(prompt, states)
    found = identify(model, prompt, fitting, dtype=dtype, device=device)
    named: dict[str, torch.Tensor] = {}
    chosen = list({**(rules or {}), **RULES}.items())
    for each in found:
        said = _tap_of(each.name, chosen)
        if said is not None and each.tap is not None and each.tap != said:
            raise TraceError(f"{each.name} is named like {said} and equals {each.tap}: give a rule for it")
        if said is not None and each.tap is None and " plus " in each.what:
            raise TraceError(
                f"{each.name} is named like {said} and is {each.what}: record another place, or give a rule"
            )
        tap = said or each.tap
        if tap is None:
            continue
        if tap in named:
            raise TraceError(f"two states are {tap}; one is {each.name}: leave one out")
        named[tap] = fitting[each.name]
    if not named:
        raise TraceError("no state could be named: " + "; ".join(str(each) for each in found[:4]))
    return Trace.from_tensors(named, prompt, model, dtype=dtype, engine=engine), [*found, *others]


def fitting_states(
    prompt: Prompt, states: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[Identification]]:
    """The states with a row for each of the prompt's tokens, and what is said of the others.

    Raises:
        TraceError: none has.
    """
    fitting = {name: state for name, state in states.items() if state.ndim == 2 and len(state) == len(prompt)}
    if not fitting:
        shapes = ", ".join(f"{name} {list(state.shape)}" for name, state in list(states.items())[:4])
        raise TraceError(
            f"no state has a row for each of the prompt's {len(prompt)} tokens: {shapes}. Is it another prompt?"
        )
    return fitting, [
        Identification(
            name, None, f"{list(state.shape)}, without a row for each of {len(prompt)} tokens: left out", float("nan")
        )
        for name, state in states.items()
        if name not in fitting
    ]


def read_rules(path: str | Path) -> dict[str, str]:
    """Read rules from a JSON object: regular expressions of names, and taps.

    Raises:
        TraceError: it is not such an object.
    """
    try:
        rules = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rules, dict) or not all(isinstance(value, str) for value in rules.values()):
            raise ValueError(f"it is {shortened(rules)}, not an object of strings")
        for pattern in rules:
            re.compile(pattern)
    except (OSError, ValueError, re.error, RecursionError) as error:
        raise TraceError(f"{path} is not a file of rules: {error}") from error
    return rules


def _tap_of(name: str, rules: list[tuple[str, str]]) -> str | None:
    for pattern, tap in rules:
        match = re.fullmatch(pattern, name)
        if match:
            for number, group in enumerate(match.groups(), 1):
                tap = tap.replace(f"{{{number}}}", group or "")
            return tap
    return None
