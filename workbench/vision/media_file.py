"""Image and sound files, read once: what is decoded and what is hashed are the same bytes, even if the file changes meanwhile."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from functools import cached_property

from ..errors import PromptError

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class MediaFile:
    """The content of a file, `data`; `name` is its path, for messages."""

    name: str
    data: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.data).hexdigest()

    def open(self) -> io.BytesIO:
        """Return the content as a file object for a decoder."""
        return io.BytesIO(self.data)


def read_media(path: str | os.PathLike, error: type[PromptError]) -> MediaFile:
    """Read a whole file.

    Raises:
        error: the given class: the file is missing, not a regular file (a pipe would block), or larger than `MAX_BYTES`.
    """
    name = os.fspath(path)
    try:
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise error(f"{name} is not a file: give the path of a file")
            if about.st_size > MAX_BYTES:
                raise error(f"{name} has {about.st_size:,} bytes, over the limit of {MAX_BYTES:,}: make it smaller")
            return MediaFile(str(name), file.read(MAX_BYTES + 1))
    except FileNotFoundError as problem:
        raise error(f"{name} does not exist") from problem
    except (OSError, ValueError, TypeError) as problem:
        if isinstance(problem, PromptError):
            raise
        raise error(f"{name!r} cannot be read: {problem}") from problem
