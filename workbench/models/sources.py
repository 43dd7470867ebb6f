"""Sources of a checkpoint's files: a local folder, or a server that supports range requests. Both count the bytes that they read."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import ModelError
from .http_source import HttpSource


class Source(Protocol):
    """A folder of files, local or remote; files are given by name. Methods raise ModelError if a file cannot be read.

    Attributes:
        bytes_read: total bytes read by `read`, and by requests for sizes.
    """

    bytes_read: int

    def exists(self, name: str) -> bool:
        """Whether the folder has a file of that name."""

    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes `[start, stop)` of a file; a file that is shorter is an error."""

    def map(self, name: str) -> mmap.mmap | None:
        """Return the whole file mapped copy-on-write; None if it is not local. ModelError if it cannot be read."""

    def release(self, name: str, start: int, stop: int) -> None:
        """Release the memory of mapped bytes `[start, stop)`, if the file is mapped; their next use reads them again."""

    def where(self, name: str) -> str:
        """The file's full path or URL, for messages."""


class FolderSource:
    """Files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._maps: dict[str, mmap.mmap] = {}
        self._files: dict[str, BinaryIO] = {}  # of the maps, to see when a file is cut

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise ModelError(f"{self.where(name)} cannot be read: {error}") from error
        _check_length(self.where(name), start, stop, len(data))
        self.bytes_read += len(data)
        return data

    def map(self, name: str) -> mmap.mmap:
        try:
            if name not in self._maps:
                file = (self.folder / name).open("rb")
                self._maps[name], self._files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), file
            size = os.fstat(self._files[name].fileno()).st_size
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.where(name)} cannot be read: {error}") from error
        if size < len(self._maps[name]):  # reading the mapped bytes that are gone would kill the process
            raise ModelError(
                f"{self.where(name)} was cut to {size} bytes while it was in use (it had {len(self._maps[name])}): fetch it again"
            )
        return self._maps[name]

    def release(self, name: str, start: int, stop: int) -> None:
        """Release the memory of the whole pages within mapped bytes `[start, stop)`; their next use reads them from the file again."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, stop // page * page
        if name in self._maps and first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[name].madvise(mmap.MADV_DONTNEED, first, last - first)

    def where(self, name: str) -> str:
        return str(self.folder / name)


def open_source(location: str) -> Source:
    """Open a folder on this machine, an `http(s)://` address of a folder, or a Hugging Face id `org/name`.

    Raises:
        ModelError: `location` is none of these.
    """
    if location.lower().startswith(("http://", "https://")):
        return HttpSource(location)
    try:
        folder = Path(location).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no checkpoint {location[:80]!r}: {error}") from error
    if is_folder:
        return FolderSource(folder)
    if location.count("/") == 1 and not location.startswith((".", "/", "~")):
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        return HttpSource(f"{constants.ENDPOINT}/{location}/resolve/main", build_hf_headers())
    raise ModelError(
        f"no checkpoint {location[:200]!r}: give a folder on this machine, the http(s) address of one, or a Hugging Face id org/name"
    )


def _check_length(where: str, start: int, stop: int, got: int) -> None:
    if got != stop - start:
        raise ModelError(
            f"{where} is cut short: bytes [{start}, {stop}) were requested and {got} arrived. Fetch the file again"
        )
