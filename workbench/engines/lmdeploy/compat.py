"""Compatibility with the installed LMDeploy: argument names in this version, and the meaning of its statuses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from ...errors import ModelError
from ..types import GenerationConfig

OLDEST, NEWEST = "0.5.0", "0.18"
"""The oldest and newest LMDeploy versions that this code was checked with. A newer one works if its calls have the same parameters."""

_STATUS = {
    "SESSION_NOT_EXIST": "it rejected the request's embeddings or ranges (TurboMind uses this status for that)",
    "SESSION_REPEAT": "another request uses this session number",
    "INPUT_LENGTH_ERROR": "prompt and new tokens are longer than session_len: open the engine with a larger one",
    "NO_QUEUE": "its queue is full or closed",
    "OUT_OF_MEMORY": "the request does not fit into its KV cache: raise cache_max_entry_count, or lower max_new_tokens",
    "PREFIX_CACHE_CONFLICT": "the request needs states that a cached prefix does not have: open with enable_prefix_caching=False",
    "INTERNAL_ENGINE_ERROR": "an error inside the engine: see its log",
    "ENGINE_STOP_ERROR": "the engine has stopped: open it again",
}


def installed_version() -> Version:
    """Return the installed version of LMDeploy.

    Raises:
        ModelError: it is not installed, cannot be imported, or is too old.
    """
    try:
        import lmdeploy
    except ModuleNotFoundError as error:
        if error.name != "lmdeploy":
            raise ModelError(f"lmdeploy is installed but lacks {error.name}: pip install {error.name}") from error
        raise ModelError(
            "lmdeploy is not installed: on a Linux machine with an NVIDIA GPU, pip install -e '.[turbomind]' in a separate "
            "environment (it needs an older torch than the one pinned here); recorded runs need neither (workbench.Recording.load)"
        ) from error
    except Exception as error:  # a wheel for another CUDA version fails with any error of its loader
        raise ModelError(f"lmdeploy is installed but cannot be imported: {type(error).__name__}: {error}") from error
    try:
        version = Version(str(lmdeploy.__version__))
    except InvalidVersion as error:
        raise ModelError(
            f"lmdeploy reports version {lmdeploy.__version__!r}, which is not valid: install a release"
        ) from error
    if version < Version(OLDEST):
        raise ModelError(f"lmdeploy {version} is older than {OLDEST}, the oldest version supported here: upgrade it")
    return version


def infer_arguments(call: Any, version: Version, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for LMDeploy's `stream_infer` or `async_stream_infer` of this version.

    Up to 0.14 these also take a session's start, end and step; they are added so that each request is a whole session.

    Args:
        call: the method to be called.
        wanted: arguments by name, which it must have.

    Raises:
        ModelError: this version lacks a parameter of `wanted`.
    """
    taken = inspect.signature(call).parameters
    lacking = [name for name in wanted if name not in taken]
    if lacking:
        raise ModelError(
            f"lmdeploy {version} takes no {', '.join(lacking)} in {call.__name__}: it is newer than {NEWEST}, the newest known here"
        )
    whole = {"sequence_start": True, "sequence_end": True, "step": 0, "stream_output": True}
    return {**wanted, **{name: value for name, value in whole.items() if name in taken}}


def embeddings_for(version: Version, items: Sequence[torch.Tensor]) -> list[Any]:
    """Convert embedding items to the type that this LMDeploy version takes: torch tensors since 0.12, NumPy arrays before."""
    plain = [item.detach().cpu() for item in items]
    if version >= Version("0.12"):
        return plain
    return [item.float().numpy() for item in plain]


def generation_config(config: GenerationConfig, stops: frozenset[int]) -> Any:
    """Convert `config`, with the stop token ids `stops`, to LMDeploy's GenerationConfig.

    Greedy decoding becomes top_k=1, because TurboMind always samples.

    Raises:
        ModelError: the installed version lacks an option that `config` uses.
    """
    from lmdeploy import GenerationConfig as Theirs

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["stop_token_ids"] = sorted(stops) or None
    values["bad_token_ids"] = list(config.bad_token_ids) if config.bad_token_ids else None
    if not config.do_sample:
        values |= {"top_k": 1, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    known = {field.name for field in dataclasses.fields(Theirs)}
    lost = [
        name for name in ("output_logits", "output_last_hidden_state", "min_p") if name not in known and values[name]
    ]
    if lost:
        raise ModelError(f"this version of lmdeploy has no {', '.join(lost)}: upgrade it, or leave the option out")
    return Theirs(**{name: value for name, value in values.items() if name in known})


def explain_status(status: Any, version: Version) -> str:
    """Return an error message for a status with which a request failed."""
    name = getattr(status, "name", str(status))
    return f"lmdeploy {version} answered {name}: {_STATUS.get(name, 'nothing more is known about this status')}"
