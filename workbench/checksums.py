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
    """Return `checksum` (XXH3-128, 32 hexadecimal digits) of an iterable of parts; a generator keeps only one in memory at a time.

    Args:
        parts: bytes, or anything with a contiguous buffer.
    """
    hashed = xxhash.xxh3_128()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
