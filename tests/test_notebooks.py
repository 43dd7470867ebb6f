"""Notebooks are stored tidy and with images; nbval compares what they print."""

from copy import deepcopy
from pathlib import Path

import nbformat
import pytest

from tests.store_notebooks import VIEW, tidy

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook == tidy(deepcopy(notebook)), "run: python -m tests.store_notebooks on it"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    # A view without an image shows nothing to whoever opens the notebook without running it.
    assert not [output for output in outputs if VIEW in output.get("data", {})]


def test_all_are_here():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(10)]
