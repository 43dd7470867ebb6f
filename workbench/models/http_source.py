"""Files on a web server, read by HTTP range requests (RFC 9110, section 14), within limits of size and time."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import urlsplit

from ..errors import ModelError, reason

_TRIES = 3
_TIMEOUT = 20.0  # seconds without a byte
_LONGEST = 30.0  # seconds that a request may take, and one more for each `_SLOWEST` bytes
_SLOWEST = 32 << 10
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class HttpSource:
    """Files below a URL; requests that fail in the network are tried three times.

    All ranges of a file must come from one version of it: sizes, ETag or Last-Modified are compared.

    Args:
        base: URL of the folder. A user name and password in it are used, but never printed.
        headers: sent with every request, for example for authorization.

    Raises:
        ModelError: an invalid URL; on use, every failure of server or network. The message contains the URL.
    """

    def __init__(self, base: str, headers: dict[str, str] | None = None) -> None:
        import httpx

        self.base = base.rstrip("/")
        self.bytes_read = 0
        self._sizes: dict[str, int | None] = {}
        self._validators: dict[str, str] = {}  # ETag or Last-Modified of each file
        self._shown = _without_password(self.base)
        try:
            httpx.URL(self.base)
            self._client = httpx.Client(
                headers={**(headers or {}), "Accept-Encoding": "identity"}, timeout=_TIMEOUT, follow_redirects=True
            )
        except Exception as error:
            raise ModelError(f"{self._shown} is not a valid address: {reason(error)}. Check it") from error

    def exists(self, name: str) -> bool:
        return self._find(name) is not None

    def size(self, name: str) -> int:
        size = self._find(name)
        if size is None:
            raise ModelError(f"{self.where(name)} does not exist (404): check the address")
        return size

    def read(self, name: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        try:
            data = self._request(name, start, stop)[0]
        except FileNotFoundError as error:
            raise ModelError(f"{self.where(name)} does not exist (404): check the address") from error
        if len(data) != stop - start:
            raise ModelError(
                f"{self.where(name)} is cut short: bytes [{start}, {stop}) were requested and {len(data)} arrived. Try again, or fetch "
                "the file by other means"
            )
        self.bytes_read += len(data)
        return data

    def map(self, name: str) -> None:
        return None

    def release(self, name: str, start: int, stop: int) -> None:
        return None

    def where(self, name: str) -> str:
        return f"{self._shown}/{name}"

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
        """Return the bytes of a range, and the whole file's size. FileNotFoundError if the server has no such file."""
        import httpx

        url = self.where(name)
        deadline = time.monotonic() + _LONGEST + (stop - start) / _SLOWEST
        for attempt in range(_TRIES):
            last = attempt + 1 == _TRIES
            try:
                return self._answer(name, start, stop, deadline, last)
            except _Retry:
                pass
            except (ModelError, FileNotFoundError):
                raise
            except httpx.TransportError as error:
                if last or isinstance(error, httpx.UnsupportedProtocol) or time.monotonic() > deadline:
                    raise ModelError(
                        f"{url} cannot be read: {reason(error)}. Check the network and the address"
                    ) from error
            except Exception as error:  # redirect loops, invalid addresses, damaged encodings
                raise ModelError(f"{url} cannot be read: {reason(error)}. Check the address and the server") from error
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, name: str, start: int, stop: int, deadline: float, last: bool) -> tuple[bytes, int]:
        url = self.where(name)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if self._validators.get(name, "").startswith(
            '"'
        ):  # a date may be too coarse for If-Range (RFC 9110, section 13.1.5)
            headers["If-Range"] = self._validators[name]
        with self._client.stream("GET", f"{self.base}/{name}", headers=headers) as answer:
            status = answer.status_code
            if status == 404:
                raise FileNotFoundError(url)
            if status == 200 and "If-Range" in headers:
                raise self._changed(name)
            if status == 200:  # the whole file would follow
                raise ModelError(
                    f"{url}: the server ignores range requests and would send the whole file; use a server that supports them "
                    "(Hugging Face does), or download the checkpoint and give its folder"
                )
            content_range = answer.headers.get("content-range", "")
            if status == 416 and content_range.rpartition("/")[2] == "0":  # an empty file has no first byte
                return b"", 0
            if status >= 500 and not last:
                raise _Retry
            if status != 206:
                hint = " (gated? log in with `hf auth login`)" if status in (401, 403) else ""
                raise ModelError(f"{url}: the server answers {status} to a range request{hint}")
            encoding = answer.headers.get("content-encoding", "identity")
            if encoding != "identity":
                raise ModelError(
                    f"{url}: the server sends bytes as {encoding[:40]!r}, although none was accepted: use another server"
                )
            total = self._total(name, start, stop, content_range)
            self._check_version(name, answer)
            return _body(answer, url, min(stop, total) - start, deadline), total

    def _total(self, name: str, start: int, stop: int, content_range: str) -> int:
        """Return the file's size, if the answer contains the bytes that were requested."""
        url, found = self.where(name), _RANGE.fullmatch(content_range)
        if found is None:
            raise ModelError(
                f"{url}: the server does not report the range and the file's size: Content-Range is {content_range[:80]!r}"
            )
        first, end, total = map(int, found.groups())
        if first != start or end + 1 != min(stop, total):
            raise ModelError(
                f"{url}: bytes [{start}, {stop}) were requested, and the server sends [{first}, {end + 1}) of {total}"
            )
        known = self._sizes.get(name)
        if known is not None and known != total:
            raise self._changed(name, f" ({known} bytes before, {total} now)")
        return total

    def _check_version(self, name: str, answer: Any) -> None:
        """Compare ETag, or Last-Modified if there is none, with that of earlier answers for the same file."""
        tag = answer.headers.get("etag", "")
        # If-Range takes only strong tags; weak ones change without the bytes.
        validator = tag if tag and not tag.startswith("W/") else answer.headers.get("last-modified", "")
        if validator and self._validators.setdefault(name, validator) != validator:
            raise self._changed(name, f" ({self._validators[name][:60]} before, {validator[:60]} now)")

    def _changed(self, name: str, detail: str = "") -> ModelError:
        return ModelError(f"{self.where(name)} was replaced on the server while it was read{detail}: start again")


class _Retry(Exception):
    """The server failed; the request may succeed if it is sent again."""


def _body(answer: Any, url: str, length: int, deadline: float) -> bytes:
    """Read a body of at most `length` bytes."""
    body = bytearray()
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) > length:
            raise ModelError(f"{url}: {length} bytes were requested, and the server sends more: use another server")
        if time.monotonic() > deadline:
            raise ModelError(
                f"{url}: {len(body)} of {length} bytes arrived within the limit of {_LONGEST + length / _SLOWEST:.0f} s: the server "
                "or the network is too slow. Download the file by other means"
            )
    return bytes(body)


def _without_password(url: str) -> str:
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        return re.sub(r"//[^/@]*@", "//", url)
