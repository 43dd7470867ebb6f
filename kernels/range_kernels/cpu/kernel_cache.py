"""Checksums for Numba's cache of compiled CPU kernels: a damaged file is compiled again instead of being run or raising."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from types import ModuleType
from typing import Any

from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

_DIGEST_BYTES = 16


class CheckedCacheFile(IndexDataCacheFile):  # type: ignore[misc]  # numba has no types
    """Numba's cache files of one kernel, with BLAKE2 of the pickled data before it.

    Files without a matching digest count as missing. Numba writes each file under another name and renames it.
    """

    def _load_index(self) -> dict[Any, str]:
        try:
            with open(self._index_path, "rb") as file:
                version, stamp, overloads = pickle.loads(_verified(file.read()))
        except Exception:  # missing, damaged, or written by another version
            return {}
        return overloads if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, pickle.dumps((self._version, self._source_stamp, overloads), protocol=-1))

    def _load_data(self, name: str) -> Any:
        path = self._data_path(name)
        with open(path, "rb") as file:
            content = file.read()
        try:
            return pickle.loads(_verified(content))
        except Exception as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise OSError(f"{path} is damaged") from error  # Numba compiles the kernel then

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), self._dump(data))

    def _write(self, path: str, content: bytes) -> None:
        with self._open_for_write(path) as file:
            file.write(_digest(content) + content)


def checked_cache(kernel: Any) -> Any:
    """Decorator over `njit(cache=True)`: use checked cache files for the kernel."""
    cache: Any = getattr(kernel, "_cache", None)
    if hasattr(cache, "_cache_file"):
        cache._cache_file.__class__ = CheckedCacheFile
    return kernel


def check_caches(*modules: ModuleType) -> None:
    """Use checked cache files for all kernels that the modules define."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                checked_cache(value)


def _verified(content: bytes) -> bytes:
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if digest != _digest(rest):
        raise ValueError("the digest does not match")
    return rest


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
