"""A store of features by content: the same picture through the same tower is computed once.

An entry's name is the SHA-256 of the picture's bytes and the tower's fingerprint (weights, processor settings, dtype), so nothing
stored can be stale. Entries are safetensors files, written beside their place and renamed into it: a reader finds a whole entry
or none, whoever is killed when.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save

from ..errors import ModelError
from .entries import LocalEntries, RemoteEntries
from .families import Features
from .images import ImageError, Picture, open_image
from .tower import VisionTower

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
        self._entries: LocalEntries | RemoteEntries
        protocol = self.url.split("://")[0] if "://" in self.url else "file"
        if protocol == "file":
            self._entries = LocalEntries(Path(self.url.removeprefix("file://")).expanduser())
        else:
            self._entries = RemoteEntries(self.url)
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
        if _company_counts(tower):
            computed = dict(enumerate(tower.features(items)))
        else:
            computed = dict(zip(missing, tower.features([items[place] for place in missing]), strict=True))
        for place in missing:
            self.put(keys[place], computed[place])
        return [computed[place] if features is None else features for place, features in enumerate(found)]

    def keys(self, tower: VisionTower, items: Sequence[Picture]) -> list[str]:
        """The entries' names for pictures that stand in one prompt."""
        company = f" of {len(items)}" if _company_counts(tower) else ""
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
        except (ModelError, ValueError, KeyError, TypeError, RuntimeError, OSError):
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


def content_digest(item: Any) -> str:
    """SHA-256 of a picture: a file's bytes, or the RGB pixels of one in memory.

    Raises:
        ImageError: a file that cannot be read, or something that is no picture.
    """
    if isinstance(item, int):  # `open` would take it for a file descriptor
        raise ImageError(f"{item!r} is no picture: give a PIL image or the path of a file")
    if isinstance(item, Image.Image):
        picture = open_image(item)  # what the tower gets: palette and orientation are applied, limits hold
        sha = hashlib.sha256(f"{picture.mode} {picture.size} ".encode())
        sha.update(picture.tobytes())
        return sha.hexdigest()
    try:
        with open(item, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (TypeError, ValueError) as error:
        raise ImageError(f"{item!r} is no picture: give a PIL image or the path of a file") from error
    except OSError as error:
        raise ImageError(f"{item} cannot be read: {error}") from error


def _company_counts(tower: VisionTower) -> bool:
    """Whether a picture's features depend on how many share its prompt."""
    return tower.family is not None and tower.family.depends_on_company
