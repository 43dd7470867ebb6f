"""Files that ship with the project: in the source tree during development, inside the package once it is installed."""

from __future__ import annotations

from pathlib import Path

from .errors import ModelError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Return the path of a folder that ships with the project, such as "notebooks" or "data/digit_cards".

    Raises:
        ModelError: it is neither in the source tree nor in the installed package.
    """
    first, _, rest = name.partition("/")
    for folder in (_PACKAGE.parent / name, _PACKAGE / f"_{first}" / rest):
        if folder.is_dir():
            return folder
    raise ModelError(
        f"{name} is missing from {_PACKAGE}: install the package again, or use a full clone of the project"
    )
