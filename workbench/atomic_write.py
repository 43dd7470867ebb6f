"""Atomic file writes: a reader finds the old file or the new one, never a part of either."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replace the content of the file at `path` with `data`. Processes that have the old file open or mapped keep the old content.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new binary file that replaces `path` when the block ends without an error.

    It is written next to `path` under a hidden temporary name, flushed to disk, and renamed; after an error it is
    removed.

    Raises:
        OSError: the file cannot be written or renamed; the old file is unchanged and the new one is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    # "x": never write into a file that another process created. Permissions follow the umask, as for any new file.
    file = open(temporary, "xb")  # noqa: SIM115, closed below
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
