"""A content-addressed feature store: the features of an image are computed once per tower.

An entry's key is the SHA-256 of the image's content and the tower's fingerprint (weights, processor settings, dtype),
so a changed image or tower has another key, and no entry can be stale. An image file is read once: the hash is of the bytes that
are decoded. Entries are safetensors files with a checksum, written atomically: a reader finds a complete entry or none, even if a
writer is killed; a damaged entry is computed again.
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

from ..schema import shortened
from .architectures import Features
from .feature_storage import LocalEntries, RemoteEntries, entry_checksum
from .images import ImageError, ImageLike, open_image
from .media_file import MediaFile, read_media
from .tower import VisionTower

_KEPT_AFTER_EVICTION = 0.9  # of the limit, so that not every write evicts


@dataclass
class StoreStats:
    """Counters of one `FeatureStore` object: lookups that found an entry or not, evicted and damaged entries.

    A damaged entry also counts as a miss.
    """

    hits: int = 0
    misses: int = 0
    evicted: int = 0
    damaged: int = 0


class FeatureStore:
    """Features of images, stored in a folder or under an fsspec URL (`s3://...`, `memory://...`).

    Several processes may use one store at once.

    Args:
        url: a folder, created if it does not exist, or any URL whose fsspec driver is installed.
        max_bytes: limit of the store's size; when it is exceeded, the least recently used entries are evicted. None: no
            limit.

    Attributes:
        stats: counters of this object.

    Raises:
        ValueError: `max_bytes` is not positive.
        ModelError: the folder cannot be created, or the URL has no driver.
    """

    def __init__(self, url: str | os.PathLike, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes}: give a positive number of bytes, or None for no limit")
        self.url, self.max_bytes = os.fspath(url), max_bytes
        self.stats = StoreStats()
        self._entries: LocalEntries | RemoteEntries
        protocol = self.url.split("://")[0] if "://" in self.url else "file"
        if protocol == "file":
            self._entries = LocalEntries(Path(self.url.removeprefix("file://")).expanduser())
        else:
            self._entries = RemoteEntries(self.url)
        self._written = 0

    def features(self, tower: VisionTower, items: Sequence[ImageLike]) -> list[Features]:
        """Return `tower.features(items)` of one prompt's images; those not in the store are computed and stored.

        Raises:
            ImageError: an image cannot be used; then no new features are stored.
            ModelError: a local store cannot be written.
        """
        items = [read_once(item) for item in items]
        keys = self.keys(tower, items)
        found = [self.get(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        if not missing:
            return [features for features in found if features is not None]
        if _depends_on_other_images(tower):
            computed = dict(enumerate(tower.features(items)))
        else:
            computed = dict(zip(missing, tower.features([items[index] for index in missing]), strict=True))
        for index in missing:
            self.put(keys[index], computed[index])
        return [computed[index] if features is None else features for index, features in enumerate(found)]

    def keys(self, tower: VisionTower, items: Sequence[ImageLike]) -> list[str]:
        """Return the keys of the images of one prompt, 64 hexadecimal digits each.

        A key includes the number of images if the tower's features depend on it (LLaVA-OneVision).

        Raises:
            ImageError: an image cannot be read.
        """
        image_count = f" of {len(items)}" if _depends_on_other_images(tower) else ""
        return [
            hashlib.sha256(f"{tower.fingerprint} {content_digest(item)}{image_count}".encode()).hexdigest()
            for item in items
        ]

    def get(self, key: str) -> Features | None:
        """Return the features stored under a key; None if missing or damaged."""
        try:
            features = self._entries.read(key)
        except FileNotFoundError:
            self.stats.misses += 1
            return None
        except Exception:
            # Damage from outside this class: a truncated copy, a bad disk. The entry is computed again and replaced.
            self.stats.damaged += 1
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        return features

    def put(self, key: str, features: Features) -> None:
        """Store the features of one image under its key (from `keys`). An existing entry is overwritten.

        Each time this object has written another 5 % of `max_bytes`, it calls `evict`, which removes the least recently
        used entries if the store is over its limit.

        Raises:
            ModelError: a local store cannot be written. (A remote one raises the errors of its fsspec driver.)
        """
        tensors = {"rows": features.rows.contiguous()}
        if features.deepstack is not None:
            tensors["deepstack"] = features.deepstack.contiguous()
        about = json.dumps({"grid": features.grid, "tiles": features.tiles})
        data = save(tensors, metadata={"about": about, "checksum": entry_checksum(tensors, about)})
        self._entries.write(key, data)
        self._written += len(data)
        # Scanning the whole store at each write would cost more than the write.
        if self.max_bytes is not None and self._written > self.max_bytes * (1 - _KEPT_AFTER_EVICTION) / 2:
            self._written = 0
            self.evict()

    def evict(self) -> int:
        """If the store is over `max_bytes`, remove the least recently used entries until it is at 90 % of it.

        Returns the number of removed entries: 0 also if another process is evicting, or without a limit.
        """
        if self.max_bytes is None:
            return 0
        removed = 0
        with self._entries.alone() as mine:
            if not mine:  # another process is evicting
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
                removed += 1
        self.stats.evicted += removed
        return removed

    def __len__(self) -> int:
        return sum(1 for _ in self._entries.scan())

    @property
    def bytes(self) -> int:
        """Total bytes of all entries."""
        return sum(size for _, size, _ in self._entries.scan())


def content_digest(item: Any) -> str:
    """Return the SHA-256 of an image: of a file's bytes (a path or a `MediaFile`), or, for an image in memory, of size and RGB pixels.

    Raises:
        ImageError: a file that cannot be read, or a value that is not an image.
    """
    content = read_once(item)
    if isinstance(content, MediaFile):
        return content.digest
    sha = hashlib.sha256(f"{content.mode} {content.size} ".encode())
    sha.update(content.tobytes())
    return sha.hexdigest()


def read_once(item: Any) -> MediaFile | Image.Image:
    """Return a file's content, or an image in memory as the tower gets it: palette and orientation applied, limits checked.

    Raises:
        ImageError: see `content_digest`.
    """
    if isinstance(item, Image.Image):
        return open_image(item)
    if isinstance(item, MediaFile):
        return item
    if isinstance(item, str | os.PathLike):
        return read_media(item, ImageError)
    raise ImageError(f"{shortened(item)} is not an image: give a PIL image or the path of a file")


def _depends_on_other_images(tower: VisionTower) -> bool:
    """Whether an image's features depend on the number of images in its prompt."""
    return tower.family is not None and tower.family.depends_on_other_images
