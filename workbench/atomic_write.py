"""Atomic file writes: a reader finds the old file or the new one, never a part of either."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

_LOCK = ".making"
_ABANDONED = 3600.0
"""Seconds after which a temporary file is taken for the remains of a killed process, whatever process has its number now."""
_QUIET = 60.0
"""The same if no process here has its number; a process on another machine that shares the folder still writes to its file."""


class AtomicFile:
    """A new file that replaces `path` on `commit`.

    It is written next to `path`, on the same file system, under a hidden random name that no other writer has. Temporary files of
    `path` that killed processes left are removed.

    Attributes:
        file: the binary file to write to.

    Raises:
        OSError: the folder cannot be written, or `path` is a link, a device, a pipe or a folder, which is never replaced.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _refuse_special(self.path)
        _remove_abandoned(self.path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
        # "x": never write into a file that another process created. Permissions follow the umask, as for any new file.
        self.file: BinaryIO = open(self.temporary, "xb")  # noqa: SIM115, closed by commit and discard

    def commit(self) -> None:
        """Flush the file to disk and rename it.

        Raises:
            OSError: it cannot be written; the old file is unchanged.
        """
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            _refuse_special(self.path)
            os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the new file; the old one is unchanged. After `commit` it does nothing."""
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replace the content of the file at `path` with `data`. Processes that have the old file open or mapped keep the old content.

    Raises:
        OSError: see `AtomicFile`; the old file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new binary file that replaces `path` when the block ends without an error; else the old file is unchanged.

    Raises:
        OSError: see `AtomicFile`.
    """
    new = AtomicFile(path)
    try:
        yield new.file
        new.commit()
    finally:
        new.discard()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` when the block ends without an error; else `target` is unchanged.

    It is built next to `target` under a hidden random name. An existing `target` is exchanged with it in one step on Linux; on other
    systems it is first renamed, so that a process killed between the two steps leaves it under a hidden name. Folders that killed
    processes left are removed.

    Raises:
        OSError: the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.making"):
        with suppress(OSError), _locked(left / _LOCK, wait=False):  # a living writer holds the lock
            shutil.rmtree(left, ignore_errors=True)
    work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.making")
    work.mkdir()
    try:
        (work / _LOCK).touch()
        with _locked(work / _LOCK):
            yield work
            (work / _LOCK).unlink()
            _take_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_place(work: Path, target: Path) -> None:
    """Rename `work` to `target`; what `target` was is then at `work`."""
    if not target.exists():
        work.rename(target)
        return
    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is not None:
        done = rename(at_working_folder, os.fsencode(work), at_working_folder, os.fsencode(target), exchange)
        if done == 0:
            return
    old = work.with_name(f"{work.name}.old")
    target.rename(old)
    work.rename(target)
    old.rename(work)


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread writes a group of files in `folder`, and keep others waiting during the block.

    The lock is on the folder itself, so it leaves no file, and a killed process releases it. On systems without such locks (Windows)
    nothing is locked.
    """
    with _locked(folder):
        yield


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file or folder; `wait=False` raises OSError if another process or thread holds it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if wait:
            with suppress(OSError):  # a network file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _refuse_special(path: Path) -> None:
    """Raise OSError if something other than a regular file has this name."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(
            f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file, and is not replaced: give another name"
        )


def _remove_abandoned(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError), os.scandir(path.parent) as found:
        for entry in found:
            if ours.fullmatch(entry.name):
                with suppress(OSError):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if age > _ABANDONED or (age > _QUIET and not psutil.pid_exists(int(entry.name.split(".")[-3]))):
                        os.unlink(entry.path)
