"""Check JSON that people edit or receive from others against pydantic models, with errors that name the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Base class of pydantic models for JSON: unknown fields and values of other types are rejected ("1" is not 1)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


R = TypeVar("R", bound=BaseModel)


def read_json(path: Path, what: str, error: type[Exception], max_bytes: int = 64 << 20) -> Any:
    """Return the JSON value in a file.

    Raises:
        error: the given exception class: the file is missing, not JSON, or larger than `max_bytes`. The message names
            the file and `what` it should be.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path} is {size / 2**20:.0f} MiB of JSON, too large for {what}: check the file name")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{path} cannot be read as {what}: {problem}") from problem


def validate(schema: type[R], value: Any, where: object, error: type[Exception]) -> R:
    """Return the JSON value `value` as an instance of `schema`.

    Raises:
        error: the given exception class: a field is wrong. The message begins with `where`, and names the field, its
            value and what it should be.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as problem:
        found = problem.errors(include_url=False)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise error(f"{where}: {_describe(found[0])}{more}") from problem


def _describe(found: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).removeprefix(".")
    kind = found["type"]
    if kind == "missing":
        return f"the field {path} is missing"
    if kind == "extra_forbidden":
        return f"the field {path} is unknown"
    message = found["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path or 'the value'} is {found['input']!r:.80}: {message}"
