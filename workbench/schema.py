"""Check JSON and settings that people write or receive from others against pydantic models; errors name the field and its value."""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError


class Record(BaseModel):
    """Base class of pydantic models for JSON: unknown fields and values of other types are rejected ("1" is not 1)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Settings(BaseModel):
    """Base class of pydantic models for arguments: NumPy's scalars are accepted, other types are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _whole(value: Any) -> int:
    if not _is_flag(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError("it must be an integer")


def _number(value: Any) -> float:
    if not _is_flag(value) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the floats
            number = math.inf
        if math.isfinite(number):
            return number
    raise ValueError("it must be a finite number")


def _flag(value: Any) -> bool:
    if not _is_flag(value):
        raise ValueError("it must be True or False")
    return bool(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (type(value).__name__ == "bool" and type(value).__module__ == "numpy")


def _whole_list(value: Any) -> tuple[int, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        try:
            return tuple(map(_whole, value))
        except (ValueError, TypeError):
            pass
    raise ValueError("it must be a list of integers")


Integer = Annotated[int, BeforeValidator(_whole)]
"""An integer of any type, NumPy's included; not a bool, a float or a string."""
Number = Annotated[float, BeforeValidator(_number)]
"""A finite real number of any type; not a bool or a string."""
Flag = Annotated[bool, BeforeValidator(_flag)]
"""A bool, Python's or NumPy's."""
Integers = Annotated[tuple[int, ...], BeforeValidator(_whole_list)]
"""A list, tuple, array or set of integers."""


def between(minimum: float, maximum: float | None = None) -> AfterValidator:
    """Return a validator for a number from `minimum` to `maximum`, both allowed."""

    def check(value: float) -> float:
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"at least {minimum:g}" if maximum is None else f"from {minimum:g} to {maximum:g}"
            raise ValueError(f"it must be {bounds}")
        return value

    return AfterValidator(check)


R = TypeVar("R", bound=BaseModel)


def checked_settings(schema: type[R], values: dict[str, Any]) -> R:
    """Return keyword arguments as an instance of `schema`.

    Raises:
        ValueError: the message names the first wrong argument, its value and what it must be.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{name} is not an argument; there are {', '.join(schema.model_fields)}") from problem
        if first["type"] == "missing":
            raise ValueError(f"{name} is missing") from problem
        raise ValueError(
            f"{name}={shortened(first['input'])}: {first['msg'].removeprefix('Value error, ')}"
        ) from problem


def shortened(value: Any, limit: int = 120) -> str:
    """Return `repr(value)` for a message, cut to `limit` characters; a value whose repr fails is described by its type."""
    try:
        text = repr(value)
    except Exception:  # the repr of somebody else's object, or an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


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
    return f"{path or 'the value'} is {shortened(found['input'], 80)}: {message}"
