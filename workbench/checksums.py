"""Checksums of stored bytes: they detect damage, not tampering, because whoever can write a file can write its checksum too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash


def checksum(*parts: Any) -> str:
    """Return XXH3-128 of the concatenated parts, 32 hexadecimal digits. It runs at the speed of memory (https://xxhash.com).

    Args:
        parts: bytes, or anything with a contiguous buffer.
    """
    return checksum_of(parts)


def checksum_of(parts: Iterable[Any]) -> str:
    """Return `checksum` of parts that are made one after the other, so that only one must be in memory."""
    hashed = xxhash.xxh3_128()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
