"""`workbench engines`: list the engines, and install those that run in an environment of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add(commands: Any) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the command to a parser; return its function by name."""
    engines = commands.add_parser(
        "engines", help="list the engines, or install one that needs an environment of its own"
    )
    actions = engines.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="which engines there are, what is installed, what they can do")
    install = actions.add_parser("install", help="make an engine's environment once, with pinned versions")
    install.add_argument("kind")
    install.add_argument(
        "pip_options", nargs=argparse.REMAINDER, help="passed to pip, for example --no-index --find-links wheels"
    )
    return {"engines": _engines}


def _engines(options: argparse.Namespace) -> int:
    return {"list": _list, "install": _install}[options.action](options)


def _install(options: argparse.Namespace) -> int:
    from ..engines.environments import environment, install

    found = environment(options.kind)
    if found.installed != found.version:
        print(f"installing {found.package} {found.version} into {found.folder} ({found.before})", flush=True)
    found = install(options.kind, options.pip_options)
    print(f"{found.kind} {found.version} is ready: workbench.open_engine({found.kind!r}, model)")
    return 0


def _list(options: argparse.Namespace) -> int:
    from ..engines.environments import ENVIRONMENTS
    from ..version import __version__

    here = {
        "numba": "this project's engine: embeddings, every tap, many requests; CPU and NVIDIA GPUs",
        "transformers": "the reference: embeddings, every tap",
        "transformers-multimodal": "Transformers with the vision model inside: images instead of embeddings",
        "turbomind": "LMDeploy's C++ engine: embeddings, states after the final norm, logits; NVIDIA GPUs",
        "lmdeploy-pytorch": "LMDeploy's PyTorch engine, which takes images: refuses embeddings",
    }
    rows = [(kind, _version(kind, __version__), text) for kind, text in here.items()]
    for kind, each in ENVIRONMENTS.items():
        found = each.installed
        rows.append((kind, found if found == each.version else f"`workbench engines install {kind}`", each.summary))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for kind, version, text in rows:
        print(f"{kind:{widths[0]}}  {version:{widths[1]}}  {text}")
    return 0


def _version(kind: str, own: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    distribution = {"transformers": "transformers", "transformers-multimodal": "transformers"}.get(kind, "lmdeploy")
    if kind == "numba":
        return own
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "`pip install lmdeploy`"
