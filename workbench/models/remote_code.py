"""Python files that come with a model: errors name them before any of them runs."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ModelError, foreign_errors


def python_files(folder: Path) -> list[str]:
    """Return the sorted names of the Python files in a model folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))


def refuse_remote_code(folder: Path, name: str) -> None:
    """Raise if the configuration in a model's folder requires Python code that comes with the model.

    Raises:
        ModelError: it does, and the message names the files that would run; or the configuration cannot be read.
    """
    with foreign_errors(ModelError, f"{folder / 'config.json'} cannot be read", "Fetch it again"):
        config = json.loads((folder / "config.json").read_text())
    wanted = config.get("auto_map") if isinstance(config, dict) else None
    if wanted:
        modules = sorted({str(entry).rpartition("--")[2].split(".")[0] + ".py" for entry in wanted.values()})
        raise ModelError(
            f"{name!r} runs its own Python code: {', '.join(modules)} in {folder} (all its Python files: "
            f"{', '.join(python_files(folder)) or 'on the hub'}). Read them, and pass trust_remote_code=True if you trust them"
        )
