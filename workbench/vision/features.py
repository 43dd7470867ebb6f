"""A store of features by content: the same picture through the same tower is computed once.

An entry's name is the SHA-256 of the picture's bytes and the tower's fingerprint (weights, processor settings, dtype), so nothing
stored can be stale. Entries are safetensors files, written beside their place and renamed into it: a reader finds a whole entry
or none, whoever is killed when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import save

from ..errors import ModelError
from .checkpoint import parse_header
from .families import Features
from .images import ImageError, Picture
from .tower import VisionTower

_SUFFIX = ".safetensors"
_KEPT_AFTER_EVICTION = 0.9  # of the bound, so that not every write evicts


@dataclass
class StoreStats:
    """What a store was asked and how it answered."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    damaged: int = 0


class FeatureStore:
    """Features of pictures, kept under a folder or an fsspec URL (`s3://...`, `memory://...`).

    Several processes may use one store at once.

    Args:
        url: a folder, made where it does not exist, or any URL whose fsspec driver is installed.
        max_bytes: the store is held under this size by dropping the entries that were used longest ago; None for no bound.
    """

    def __init__(self, url: str | os.PathLike, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes}: give a positive number of bytes, or None for no bound")
        self.url, self.max_bytes = os.fspath(url), max_bytes
        self.stats = StoreStats()
        self._entries: _LocalEntries | _RemoteEntries
        protocol = self.url.split("://")[0] if "://" in self.url else "file"
        if protocol == "file":
            self._entries = _LocalEntries(Path(self.url.removeprefix("file://")).expanduser())
        else:
            self._entries = _RemoteEntries(self.url)
        self._written = 0

    def features(self, tower: VisionTower, items: Sequence[Picture]) -> list[Features]:
        """`tower.features(items)`, computing only what the store does not hold.

        Raises:
            ImageError: a picture that cannot be used; what came before it is stored.
        """
        keys = self.keys(tower, items)
        found = [self.get(key) for key in keys]
        missing = [place for place, features in enumerate(found) if features is None]
        if not missing:
            return [features for features in found if features is not None]
        if _depends_on_company(tower):
            computed = dict(enumerate(tower.features(items)))
        else:
            computed = dict(zip(missing, tower.features([items[place] for place in missing]), strict=True))
        for place in missing:
            self.put(keys[place], computed[place])
        return [computed[place] if features is None else features for place, features in enumerate(found)]

    def keys(self, tower: VisionTower, items: Sequence[Picture]) -> list[str]:
        """The entries' names for pictures that stand in one prompt."""
        company = f" of {len(items)}" if _depends_on_company(tower) else ""
        return [
            hashlib.sha256(f"{tower.fingerprint} {content_digest(item)}{company}".encode()).hexdigest()
            for item in items
        ]

    def get(self, key: str) -> Features | None:
        """A stored entry, memory-mapped where the store is local; None where there is none, or a damaged one."""
        try:
            features = self._entries.read(key)
        except FileNotFoundError:
            self.stats.misses += 1
            return None
        except (ModelError, ValueError, KeyError):
            # Not written by this class: a copy cut short, a bad disk. Computed anew, it is replaced.
            self.stats.damaged += 1
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        return features

    def put(self, key: str, features: Features) -> None:
        """Store an entry; one that is there already is replaced by its equal."""
        tensors = {"rows": features.rows.contiguous()}
        if features.deepstack is not None:
            tensors["deepstack"] = features.deepstack.contiguous()
        about = {"grid": features.grid, "tiles": features.tiles}
        data = save(tensors, metadata={"about": json.dumps(about)})
        self._entries.write(key, data)
        self._written += len(data)
        # Looking over the whole store at each write would cost more than the write.
        if self.max_bytes is not None and self._written > self.max_bytes * (1 - _KEPT_AFTER_EVICTION) / 2:
            self._written = 0
            self.evict()

    def evict(self) -> int:
        """Drop the entries used longest ago until the store is below its bound; returns how many went."""
        if self.max_bytes is None:
            return 0
        gone = 0
        with self._entries.alone() as mine:
            if not mine:  # another process is at it
                return 0
            entries = sorted(self._entries.scan())
            total = sum(size for _, size, _ in entries)
            if total <= self.max_bytes:
                return 0
            for _, size, name in entries:
                if total <= self.max_bytes * _KEPT_AFTER_EVICTION:
                    break
                self._entries.remove(name)
                total -= size
                gone += 1
        self.stats.evicted += gone
        return gone

    def __len__(self) -> int:
        return sum(1 for _ in self._entries.scan())

    @property
    def bytes(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries.scan())


class _LocalEntries:
    """Entries in a folder, in 256 subfolders by the first two digits of their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"the feature store {folder} cannot be made: {error}") from error

    def read(self, key: str) -> Features:
        path = self._path(key)
        with open(path, "rb") as file:
            # A private mapping: torch wants memory it may write to, and what is written never reaches the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        features = _parse(mapped, path)
        with contextlib.suppress(OSError):
            os.utime(path)  # eviction goes by last use
        return features

    def write(self, key: str, data: bytes) -> None:
        path = Path(self._path(key))
        path.parent.mkdir(exist_ok=True)
        # The name starts with a dot and has no suffix of an entry: what a killed writer leaves is never read as one.
        beside = path.parent / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ModelError(f"the feature store {self.folder} cannot be written: {error}") from error

    def scan(self) -> Iterator[tuple[float, int, str]]:
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                yield about.st_mtime, about.st_size, str(path)

    def remove(self, name: str) -> None:
        Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        lock = FileLock(self.folder / ".evicting.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            for left in self.folder.glob("*/.*"):  # of writers that were killed an hour ago or more
                with contextlib.suppress(FileNotFoundError):
                    if _age(left) > 3600:
                        left.unlink()
            yield True
        finally:
            lock.release()

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key[:2]}/{key}{_SUFFIX}"


class _RemoteEntries:
    """Entries behind an fsspec file system. One object is written by one call, which object stores make whole or not at all."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ModelError(f"the feature store {url!r} cannot be opened: {error}") from error

    def read(self, key: str) -> Features:
        path = self._path(key)
        return _parse(bytearray(self.files.cat_file(path)), path)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(path, data)

    def scan(self) -> Iterator[tuple[float, int, str]]:
        if not self.files.exists(self.root):
            return
        for path, about in self.files.find(self.root, detail=True).items():
            if path.endswith(_SUFFIX):
                when = about.get("mtime") or about.get("LastModified") or about.get("created") or 0.0
                yield float(when.timestamp() if hasattr(when, "timestamp") else when), int(about["size"]), path

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(name)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        yield True  # two processes that evict at once drop the same entries

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key[:2]}/{key}{_SUFFIX}"


def content_digest(item: Any) -> str:
    """SHA-256 of a picture: a file's bytes, or mode, size and pixels of one in memory.

    Raises:
        ImageError: a file that cannot be read, or something that is no picture.
    """
    if isinstance(item, int):  # `open` would take it for a file descriptor
        raise ImageError(f"{item!r} is no picture: give a PIL image or the path of a file")
    if isinstance(item, Image.Image):
        sha = hashlib.sha256(f"{item.mode} {item.size} ".encode())
        sha.update(item.tobytes())
        return sha.hexdigest()
    try:
        with open(item, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (TypeError, ValueError) as error:
        raise ImageError(f"{item!r} is no picture: give a PIL image or the path of a file") from error
    except OSError as error:
        raise ImageError(f"{item} cannot be read: {error}") from error


def _parse(data: mmap.mmap | bytearray, where: str) -> Features:
    """Features from a safetensors file's bytes, without a copy. (The library's own reader takes twice the time of a whole hit.)"""
    length = int.from_bytes(data[:8], "little")
    entries, metadata = parse_header(bytes(data[8 : 8 + length]), "", where, len(data))
    tensors = {
        name: torch.frombuffer(data, dtype=entry.dtype, count=prod(entry.shape), offset=entry.start).view(entry.shape)
        for name, entry in entries.items()
    }
    about = json.loads(metadata["about"])
    grid = about["grid"]
    return Features(tensors["rows"], tuple(grid) if grid else None, tensors.get("deepstack"), tuple(about["tiles"]))


def _depends_on_company(tower: VisionTower) -> bool:
    """Whether a picture's features depend on how many share its prompt: LLaVA-OneVision cuts a picture only if it is alone."""
    return tower.config.model_type == "llava_onevision"


def _age(path: Path) -> float:
    import time

    return time.time() - path.stat().st_mtime
