"""Return freed memory to the operating system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any


def return_freed_memory(collect: bool = True) -> None:
    """Make glibc's allocator return freed memory that it would keep: hundreds of megabytes after a model was dropped.

    Without glibc (musl, macOS, Windows) it can only collect garbage.

    Args:
        collect: whether to collect garbage first, which takes a tenth of a second.
    """
    if collect:
        gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
