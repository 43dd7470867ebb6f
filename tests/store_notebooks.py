"""Execute notebooks and clean their outputs: `python -m tests.store_notebooks notebooks/04*.ipynb`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

VIEW = "application/vnd.jupyter.widget-view+json"


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove data of a single run: execution times, widget state, and widget views that have an image.

    Without a kernel such a view shows "model not found" instead of its image.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop(VIEW, None)
            before = outputs[-1] if outputs else None
            if (
                before is not None
                and output.output_type == before.output_type == "stream"
                and output.name == before.name
            ):
                before.text += output.text  # how a stream is split into outputs is arbitrary
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


def main() -> None:
    os.environ["WORKBENCH_SNAPSHOT_SECONDS"] = "60"
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        nbformat.write(tidy(notebook), path)
        print(f"{path} is saved: review its outputs")


if __name__ == "__main__":
    main()
