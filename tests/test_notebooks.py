"""Stored notebooks have clean outputs and images; nbval compares their printed text."""

from copy import deepcopy
from pathlib import Path

import nbformat
import pytest

from tests.store_notebooks import VIEW, tidy

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_is_clean_and_has_no_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook == tidy(deepcopy(notebook)), "run `python -m tests.store_notebooks` on this notebook"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    # A widget view without an image shows nothing until the notebook is run.
    assert not [output for output in outputs if VIEW in output.get("data", {})]


def test_notebooks_are_numbered_00_to_11():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(12)]
