"""Let torchvision be imported with a CPU build of torch.

PyPI's torchvision for Linux is built for CUDA. With a CPU build of torch its compiled operators do not load, and then its import fails
while it describes two of them (`torchvision::nms`, `qnms`), although the image processors, which only resize and normalise, use none. So
they are declared, without an implementation, before it is imported. Where the operators load, nothing is declared.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing_operators() -> None:
    """Declare torchvision's operators if they cannot be loaded; called once, before torchvision is imported."""
    import torch

    spec = PathFinder.find_spec("torchvision")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    for library in [
        path for folder in folders for path in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd"))
    ]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            for name in _OPERATORS:
                torch.library.define(f"torchvision::{name}", _SCHEMA)
        return
