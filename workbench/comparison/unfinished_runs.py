"""What interrupted runs of the reference have done, kept in a folder: the same call goes on at the layer where it stopped.

    unfinished-runs/<digest of what is run>/states.safetensors    the last finished layer's states of every run, and their errors so far
                                            taps-<n>.safetensors  float64 states that were traced

The folder is removed when the runs have ended.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..atomic_write import atomic_write
from ..checksums import checksum
from ..errors import TraceError, reason
from ..models.cache import cache_folder
from ..trace.files import raw_bytes

INTERVAL = 20.0
"""Seconds between two writes; an error or an interruption writes too."""
_KEPT = 7 * 86400.0
"""Seconds after which the remains of other runs are removed."""
_STATES = "states.safetensors"


class UnfinishedRuns:
    """The folder of one set of runs.

    Args:
        what: JSON values that name what is run: prompts, model, taps, dtype, versions.
        folder: None: one in the cache folder, found again by `what`.

    Raises:
        TraceError: `folder` has other runs, or cannot be read.
    """

    def __init__(self, what: Mapping[str, Any], folder: Path | None = None) -> None:
        self._what = json.loads(json.dumps(what))
        digest = hashlib.sha256(json.dumps(self._what, sort_keys=True).encode()).hexdigest()[:32]
        self._parent = cache_folder().parent / "unfinished-runs"
        self.folder = self._parent / digest if folder is None else folder
        self._own = folder is None
        self._files: list[str] = []
        self._written = time.monotonic()
        self._works = True

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written > INTERVAL

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return states, traced states and what else was saved; None if nothing is there, or what is there is damaged."""
        path = self.folder / _STATES
        if not path.exists():
            return None
        try:
            tensors, record = _read(path)
            other = record["what"]
        except Exception as error:
            if not self._own:
                raise TraceError(f"{path} cannot be read: {reason(error)}. Remove the folder {self.folder}") from error
            return None
        if other != self._what:
            differs = [name for name in {**other, **self._what} if other.get(name) != self._what.get(name)]
            raise TraceError(
                f"{self.folder} has unfinished runs of something else (other {', '.join(sorted(differs))}): give another folder, or remove it"
            )
        taps: dict[str, torch.Tensor] = {}
        try:
            for name in record["files"]:
                taps |= _read(self.folder / name)[0]
        except Exception as error:
            if not self._own:
                raise TraceError(f"{self.folder} is damaged: {reason(error)}. Remove it, and begin again") from error
            return None
        self._files = list(record["files"])
        return tensors, taps, record["rest"]

    def save(
        self, states: Mapping[str, torch.Tensor], taps: Mapping[str, torch.Tensor], rest: Mapping[str, Any]
    ) -> bool:
        """Write states, and the traced states that were not written yet; return whether it worked. A full disk does not stop the runs."""
        self._written = time.monotonic()
        if not self._works:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if taps:
                name = f"taps-{len(self._files)}.safetensors"
                _write(self.folder / name, taps, {})
                self._files.append(name)
            _write(self.folder / _STATES, states, {"what": self._what, "files": self._files, "rest": dict(rest)})
            if self._own:
                self._remove_old()
        except (OSError, SafetensorError) as error:
            self._works = False
            print(
                f"the states of the layers done cannot be kept in {self.folder} ({reason(error)}): if this run is interrupted, the next "
                "begins again. Free space there, or set WORKBENCH_CACHE to another folder",
                file=sys.stderr,
            )
        return self._works

    def remove(self) -> None:
        """Remove the folder: the runs have ended."""
        if self._files or (self.folder / _STATES).exists():
            for name in (*self._files, _STATES):
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):
                self.folder.rmdir()

    def _remove_old(self) -> None:
        for other in self._parent.iterdir():
            if other != self.folder and time.time() - other.stat().st_mtime > _KEPT:
                shutil.rmtree(other, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: checksum(raw_bytes(tensor)) for name, tensor in own.items()}
    atomic_write(path, save(own, {"record": json.dumps(record), "sums": json.dumps(sums)}))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    sums = json.loads(metadata["sums"])
    damaged = [name for name, tensor in tensors.items() if checksum(raw_bytes(tensor)) != sums[name]]
    if damaged:
        raise ValueError(f"{path.name}: {damaged[0]} was damaged")
    return tensors, json.loads(metadata["record"])
