"""`workbench lab`: copy the notebooks that come with the package into a folder and open JupyterLab there."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..package_data import data_folder

# No request leaves the machine: no news, no update check, no extension gallery.
OFFLINE = [
    "--LabApp.news_url=",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
]
FIRST_NOTEBOOK = "01_where_embeddings_land.ipynb"


def add(commands: Any) -> dict[str, Any]:
    """Add the parser of `lab` to the subparsers `commands`; return `{"lab": function of the parsed options}`."""
    lab = commands.add_parser("lab", help="copy the notebooks into a folder and open JupyterLab")
    lab.add_argument("folder", nargs="?", default="embedding-workbench", help="created if it does not exist")
    lab.add_argument("--no-open", action="store_true", help="copy the notebooks only")
    lab.add_argument("--port", type=int, default=8888)
    return {"lab": _lab}


def copy_notebooks(folder: Path) -> list[Path]:
    """Copy the notebooks into a folder, with the images, recorded runs and benchmark records that they open.

    The folder is created if it does not exist; existing files are not changed.

    Returns:
        the files that were copied.

    Raises:
        ModelError: the folder cannot be written.
    """
    copied = []
    try:
        for part in ("notebooks", "data/images", "data/runs", "data/bench"):
            source = data_folder(part)
            for file in sorted(source.rglob("*")):
                target = folder / part / file.relative_to(source)
                if file.is_file() and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
                    copied.append(target)
    except OSError as error:
        raise ModelError(f"the notebooks cannot be copied to {folder}: {error}") from error
    return copied


def _lab(options: argparse.Namespace) -> int:
    folder = Path(options.folder).expanduser()
    copied = copy_notebooks(folder)
    print(f"{len(copied)} files copied to {folder.resolve()}")
    if options.no_open:
        return 0
    command = [sys.executable, "-m", "jupyterlab", *OFFLINE, f"--port={options.port}", f"notebooks/{FIRST_NOTEBOOK}"]
    return subprocess.run(command, cwd=folder).returncode
