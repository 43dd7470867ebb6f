"""A cache of model folders built on this machine. Each is written under another name and renamed: a killed run leaves no partial one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from safetensors import SafetensorError

from ..atomic_write import atomic_write
from ..checksums import checksum_of
from ..errors import ModelError

_MANIFEST = "workbench.json"


def cache_folder() -> Path:
    """Return the folder that contains the cached models: `models` in `$WORKBENCH_CACHE`, or in the user's cache folder."""
    return Path(os.environ.get("WORKBENCH_CACHE") or user_cache_dir("embedding-workbench")) / "models"


def cached_folder(name: str, make: Callable[[Path], None], source: dict[str, str]) -> Path:
    """Return the cached folder of model `name`, and build it first if it is missing, incomplete or was built from another source.

    Processes that need the same folder wait for the one that builds it.

    Args:
        make: called with a path at which it must create the folder.
        source: what the folder is built from (versions, digests); stored with it and compared.

    Raises:
        ModelError: the folder cannot be written. Other errors of `make` are raised unchanged.
    """
    target = cache_folder() / name
    if _complete(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{name}.lock", name):
            if not _complete(target, source):
                _make(target, make, source)
    except (OSError, SafetensorError) as error:  # the safetensors library has its own error for a full disk
        raise ModelError(
            f"{name} could not be written to {target.parent} ({error}): free about 1 GB there, or set WORKBENCH_CACHE to "
            "another folder"
        ) from error
    return target


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold a lock; report on stderr if another process has it for more than two seconds."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        print(
            f"Waiting for another process that is making {name} in {path.parent} (it holds {path.name})",
            file=sys.stderr,
            flush=True,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _complete(target: Path, source: dict[str, str]) -> bool:
    """Whether every file that `make` wrote exists with its content and was made from this source.

    The content is compared by its checksum if size, modification time or inode of a file changed since it was last compared.
    """
    try:
        manifest = json.loads((target / _MANIFEST).read_text())
        if manifest["source"] != source:
            return False
        stamps = {name: _stamp(target / name) for name in manifest["checksums"]}
        if stamps != manifest["stamps"]:
            if any(_checksum(target / name) != expected for name, expected in manifest["checksums"].items()):
                return False
            with suppress(OSError):  # a cache that this user cannot write is compared each time
                atomic_write(target / _MANIFEST, json.dumps({**manifest, "stamps": stamps}, indent=1).encode())
        return True
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ino]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return checksum_of(iter(lambda: file.read(1 << 24), b""))


def _make(target: Path, make: Callable[[Path], None], source: dict[str, str]) -> None:
    for left in target.parent.glob(f".{target.name}.making-*"):  # left by killed runs: this process has the lock
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    try:
        made = work / "model"
        make(made)
        files = sorted(made.iterdir())
        sums, stamps = ({file.name: function(file) for file in files} for function in (_checksum, _stamp))
        (made / _MANIFEST).write_text(json.dumps({"source": source, "checksums": sums, "stamps": stamps}, indent=1))
        if target.exists():  # incomplete, otherwise _make would not run
            target.rename(work / "broken")
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
