"""Sources of a checkpoint's files: a local folder, or a server that supports range requests. Both count the bytes that they read."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from ..errors import ModelError

_TRIES = 3
_TIMEOUT = 30.0  # seconds without a byte


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

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        try:
            with (self.folder / name).open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise ModelError(f"{self.where(name)} cannot be read: {error}") from error
        _check_length(self.where(name), start, stop, len(data))
        self.bytes_read += len(data)
        return data

    def map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            try:
                with (self.folder / name).open("rb") as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ModelError(f"{self.where(name)} cannot be read: {error}") from error
        return self._maps[name]

    def release(self, name: str, start: int, stop: int) -> None:
        """Release the memory of the whole pages within mapped bytes `[start, stop)`; their next use reads them from the file again."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, stop // page * page
        if name in self._maps and first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[name].madvise(mmap.MADV_DONTNEED, first, last - first)

    def where(self, name: str) -> str:
        return str(self.folder / name)


class HttpSource:
    """Files below a URL, read by HTTP range requests (RFC 9110, section 14); failed requests are tried three times.

    Args:
        base: URL of the folder.
        headers: sent with every request, for example for authorization.
    """

    def __init__(self, base: str, headers: dict[str, str] | None = None) -> None:
        import httpx

        self.base = base.rstrip("/")
        self.bytes_read = 0
        self._sizes: dict[str, int | None] = {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True)

    def exists(self, name: str) -> bool:
        return self._find(name) is not None

    def size(self, name: str) -> int:
        size = self._find(name)
        if size is None:
            raise ModelError(f"{self.where(name)} does not exist (404): check the address")
        return size

    def read(self, name: str, start: int, stop: int) -> bytes:
        data = self._request(name, start, stop)[0] if stop > start else b""
        _check_length(self.where(name), start, stop, len(data))
        self.bytes_read += len(data)
        return data

    def map(self, name: str) -> None:
        return None

    def release(self, name: str, start: int, stop: int) -> None:
        return None

    def where(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _find(self, name: str) -> int | None:
        """Return the file's size; None if the server has no such file."""
        if name not in self._sizes:
            try:
                data, self._sizes[name] = self._request(name, 0, 1)
                self.bytes_read += len(data)
            except FileNotFoundError:
                self._sizes[name] = None
        return self._sizes[name]

    def _request(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Return the bytes of a range, and the whole file's size."""
        import httpx

        url = self.where(name)
        for attempt in range(_TRIES):
            try:
                with self._client.stream("GET", url, headers={"Range": f"bytes={start}-{stop - 1}"}) as answer:
                    if answer.status_code == 404:
                        raise FileNotFoundError(url)
                    if answer.status_code == 200:  # the whole file would follow
                        raise ModelError(
                            f"{url}: the server ignores range requests and would send the whole file; use a server that "
                            "supports them (Hugging Face does), or download the checkpoint and give its folder"
                        )
                    total = answer.headers.get("content-range", "").rpartition("/")[2]
                    if answer.status_code == 416 and total == "0":  # an empty file has no first byte
                        return b"", 0
                    if answer.status_code >= 500 and attempt + 1 < _TRIES:
                        time.sleep(0.2 * 2**attempt)
                        continue
                    if answer.status_code != 206:
                        hint = " (gated? log in with `hf auth login`)" if answer.status_code in (401, 403) else ""
                        raise ModelError(f"{url}: the server answers {answer.status_code} to a range request{hint}")
                    if not total.isdigit():
                        raise ModelError(f"{url}: the server does not report the file's size in Content-Range")
                    return answer.read(), int(total)
            except httpx.TransportError as error:
                if attempt + 1 == _TRIES:
                    raise ModelError(
                        f"{url} cannot be read: {type(error).__name__}: {error}. Check the network"
                    ) from error
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def open_source(location: str) -> Source:
    """Open a folder on this machine, an `http(s)://` address of a folder, or a Hugging Face id `org/name`.

    Raises:
        ModelError: `location` is none of these.
    """
    if urlsplit(location).scheme in ("http", "https"):
        return HttpSource(location)
    if Path(location).expanduser().is_dir():
        return FolderSource(Path(location).expanduser())
    if location.count("/") == 1 and not location.startswith((".", "/", "~")):
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        return HttpSource(f"{constants.ENDPOINT}/{location}/resolve/main", build_hf_headers())
    raise ModelError(
        f"no checkpoint {location!r}: give a folder on this machine, the http(s) address of one, or a Hugging Face id org/name"
    )


def _check_length(where: str, start: int, stop: int, got: int) -> None:
    if got != stop - start:
        raise ModelError(
            f"{where} is cut short: bytes [{start}, {stop}) were requested and {got} arrived. Fetch the file again"
        )
