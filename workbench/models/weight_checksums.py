"""Checksums of all tensors of a checkpoint, kept until a file changes."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from ..atomic_write import atomic_write
from ..checksums import checksum, checksum_of
from .cache import cache_folder
from .checkpoint import Checkpoint

_BLOCK = 16 << 20


def weight_checksums(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checksum of every tensor's bytes, by name.

    They are stored in the cache folder with size, modification time, inode and device of the checkpoint's files, and computed again if
    one of these differs. If the cache folder cannot be written they are computed each time.

    Raises:
        ModelError: a file cannot be read.
    """
    entries = checkpoint.entries(checkpoint)
    shards = sorted({entry.shard for entry in entries.values()})
    stamps = [[shard, *_stamp(folder / shard)] for shard in shards]
    kept = cache_folder().parent / "checksums" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
    with suppress(Exception):  # missing or damaged: computed below
        stored = json.loads(kept.read_text())
        if stored["stamps"] == stamps and set(stored["sums"]) == set(entries) and stored["checksum"] == _own(stored):
            return dict(stored["sums"])
    sums = {}
    for name, entry in sorted(entries.items(), key=lambda each: (each[1].shard, each[1].start)):
        blocks = range(entry.start, entry.stop, _BLOCK)
        read = checkpoint.source.read
        sums[name] = checksum_of(read(entry.shard, start, min(start + _BLOCK, entry.stop)) for start in blocks)
    record = {"stamps": stamps, "sums": sums}
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps({**record, "checksum": _own(record)}).encode())
    return sums


def _own(record: dict) -> str:
    return checksum(json.dumps([record["stamps"], record["sums"]], sort_keys=True).encode())


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ino, about.st_dev]
