"""Runs that other programs recorded: token ids with the log-probability that an engine reported for each, as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..prompt import Prompt
from ..schema import shortened

# By what it is, the names that vLLM, SGLang, LMDeploy, verl and TRL give it.
_HUGE = 1e9
_PROMPT = ("prompt_token_ids", "prompt_ids", "input_ids", "prompts")
_TOKENS = ("token_ids", "output_ids", "completion_ids", "response_ids", "responses")
_LOGPROBS = (
    "logprobs", "output_token_logprobs", "rollout_log_probs", "sampling_per_token_logps", "old_log_probs", "token_logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """One generated sequence.

    Attributes:
        prompt: what it was generated from.
        token_ids: the generated tokens.
        logprobs: the natural log-probability that the engine reported for each.
        temperature, top_p, top_k: how they were sampled; 1, 1 and 0 leave the distribution as it is.
        name: the file's line, for messages.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    name: str = "the run"


def read_rollouts(path: str | Path) -> list[Rollout]:
    """Read a file of JSON lines; each has the prompt's ids (or `prompt`, a file that `Prompt.save` wrote), tokens and log-probabilities.

    Names of fields and forms of log-probabilities are those of vLLM, SGLang, LMDeploy, verl and TRL: numbers, pairs
    `[logprob, id, ...]`, or objects `{id: logprob}` and `{id: {"logprob": ...}}`.

    Raises:
        PromptError: the file cannot be read, or a line is not such a run; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read: {error}") from error
    found = [
        _rollout(line, f"{path.name}, line {number}", path.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise PromptError(f"{path} has no runs: give one JSON object per line")
    return found


def _rollout(line: str, name: str, folder: Path) -> Rollout:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise PromptError(f"{name} is {shortened(fields)}: give an object")
    if isinstance(fields.get("prompt"), str) and fields["prompt"].endswith(".json"):
        prompt = Prompt.load(folder / fields["prompt"])
    else:
        prompt = Prompt(_ids(fields, _PROMPT, name))
    tokens = _ids(fields, _TOKENS, name)
    key, values = _first(fields, _LOGPROBS, name)
    if not isinstance(values, list) or len(values) != len(tokens):
        count = len(values) if isinstance(values, list) else shortened(values)
        raise PromptError(f"{name} has {len(tokens)} tokens and {count} {key}: give one for each token")
    logprobs = tuple(
        _logprob(value, token, f"{name}, {key}[{at}]")
        for at, (value, token) in enumerate(zip(values, tokens, strict=True))
    )
    settings = {
        name_: _number(fields, name_, default, name) for name_, default in (("temperature", 1.0), ("top_p", 1.0))
    }
    top_k = int(_number(fields, "top_k", 0, name))
    return Rollout(prompt, tuple(tokens), logprobs, settings["temperature"], settings["top_p"], max(top_k, 0), name)


def _first(fields: Mapping[str, Any], names: Sequence[str], name: str) -> tuple[str, Any]:
    for each in names:
        if fields.get(each) is not None:
            return each, fields[each]
    raise PromptError(f"{name} has none of {', '.join(names)}")


def _ids(fields: Mapping[str, Any], names: Sequence[str], name: str) -> list[int]:
    key, value = _first(fields, names, name)
    if not isinstance(value, list) or not value or any(type(token) is not int for token in value):
        raise PromptError(f"{name}, {key} is {shortened(value)}: give a list of token ids")
    return value


def _number(fields: Mapping[str, Any], key: str, default: float, name: str) -> float:
    value = default if fields.get(key) is None else fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE < value < _HUGE:
        raise PromptError(f"{name}, {key} is {shortened(value)}: give a number")
    return float(value)


def _logprob(value: Any, token: int, name: str) -> float:
    """One reported log-probability in any of the forms."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = value.get(str(token), value.get("logprob"))
        if isinstance(value, dict):
            value = value.get("logprob")
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value == -math.inf or -_HUGE < value <= 1e-3)
    ):
        raise PromptError(f"{name} is {shortened(value)} for token {token}: a log-probability is a number of at most 0")
    return float(value)


def written(rollouts: Sequence[Rollout]) -> Iterator[str]:
    """The lines of a file that `read_rollouts` reads, for prompts without embeddings."""
    for each in rollouts:
        yield json.dumps(
            {
                "prompt_token_ids": list(each.prompt.input_ids),
                "token_ids": list(each.token_ids),
                "logprobs": list(each.logprobs),
                "temperature": each.temperature,
                "top_p": each.top_p,
                "top_k": each.top_k,
            }
        )
