"""Messages between this process and an engine's worker in another environment: JSON and safetensors, never pickle.

A message is a JSON object and tensors by name. This file is also imported by the workers, which have none of the project's other
dependencies, so it imports only what every engine's environment has.
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save

_LENGTHS = struct.Struct("<QQ")
LARGEST = 1 << 34
"""The largest part of a message, in bytes. A larger number means that the stream has something else, such as text of a library."""


class WireError(Exception):
    """The other side is gone, or what it sent is not a message."""


def write_message(stream: BinaryIO, fields: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write one message and flush.

    Raises:
        WireError: the other side is gone.
    """
    header = json.dumps(fields).encode()
    named = {name: value.detach().cpu().contiguous() for name, value in (tensors or {}).items()}
    body = save(named) if named else b""
    try:
        stream.write(_LENGTHS.pack(len(header), len(body)))
        stream.write(header)
        stream.write(body)
        stream.flush()
    except (OSError, ValueError) as error:
        raise WireError(str(error)) from error


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Wait for one message and return its fields and tensors.

    Raises:
        WireError: the stream ended, or what came is not a message.
    """
    sizes = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if max(sizes) > LARGEST:
        raise WireError(f"{max(sizes)} bytes are not a message")
    header, body = (_exactly(stream, size) for size in sizes)
    try:
        fields = json.loads(header)
        tensors = load(body) if body else {}
    except Exception as error:
        raise WireError(f"not a message: {error}") from error
    if not isinstance(fields, dict):
        raise WireError("not a message: its fields are not an object")
    return fields, tensors


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            raise WireError("the stream ended")
        data = part if not data else data + part
    return data
