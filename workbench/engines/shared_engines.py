"""Engines that several views of one process share: one per model and dtype, closed when its last user has released it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..models import Model
from . import open_engine
from .base import Engine

_Key = tuple[str, str, bool, str]


@dataclass
class _Shared:
    engine: Engine
    users: int


_open: dict[_Key, _Shared] = {}
_lock = threading.Lock()


def acquire_engine(name: str, model: Model, dtype: str) -> Engine:
    """Return the open engine of this name, model and dtype, or open one; whoever acquires it calls `release_engine` once.

    Raises:
        ModelError, ValueError: as `open_engine`.
    """
    key = (name, model.digest, model.trust_remote_code, dtype)
    with _lock:
        kept = _open.get(key)
        if kept is None or kept.engine.closed:
            kept = _open[key] = _Shared(open_engine(name, model, dtype=dtype), 0)
        kept.users += 1
        return kept.engine


def release_engine(engine: Engine) -> None:
    """End one use of an engine from `acquire_engine`; after the last one it is closed."""
    with _lock:
        for key, kept in list(_open.items()):
            if kept.engine is engine:
                kept.users -= 1
                if kept.users:
                    return
                del _open[key]
    engine.close()
