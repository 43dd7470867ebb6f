"""Truncate a checkpoint to its first layers, for engines that expose only the last hidden state."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path


def truncate_checkpoint(source: Path, target: Path, layers: int) -> Path:
    """Fill the existing folder `target` with a checkpoint of only the first `layers` layers of the one in `source`; return `target`.

    Files are linked, or copied if the file system has no links; only num_hidden_layers and layer_types in config.json differ.
    """
    for file in source.iterdir():
        if file.name != "config.json" and file.is_file():
            with contextlib.suppress(FileExistsError):
                try:
                    os.symlink(file.resolve(), target / file.name)
                except OSError:  # a file system without links
                    shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict) and "num_hidden_layers" in part:
            part["num_hidden_layers"] = layers
            if isinstance(part.get("layer_types"), list):
                part["layer_types"] = part["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config))
    return target
