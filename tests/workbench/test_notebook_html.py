"""Notebooks as HTML without a network: every view is a picture."""

from __future__ import annotations

import base64
import re

import nbformat
from nbconvert.exporters import get_exporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from workbench.plots.figure import Figure

VIEW = "application/vnd.jupyter.widget-view+json"


def picture():
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return base64.b64encode(figure._repr_png_()).decode()


def notebook():
    png = picture()
    outputs = [
        new_output("display_data", {VIEW: {"model_id": "a"}, "image/png": png, "text/plain": "View()"}),
        new_output("display_data", {VIEW: {"model_id": "b"}, "text/plain": "a view without a picture"}),
    ]
    made = new_notebook(cells=[new_code_cell("view", outputs=outputs)])
    made.metadata["widgets"] = {
        "application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}
    }
    return made, png


def test_views_are_pictures_and_nothing_is_loaded():
    made, png = notebook()
    before = nbformat.writes(made)
    html, _ = get_exporter("workbench_html")().from_notebook_node(made)
    assert re.sub(r"\s", "", png)[:60] in re.sub(r"\s", "", html)
    assert "a view without a picture" in html
    assert not re.search(r"(src|href)=[\"']https?://", html)
    assert "jupyter.widget-view" not in html
    assert nbformat.writes(made) == before  # the notebook itself is unchanged


def test_a_figure_is_displayed_without_matplotlibs_inline_backend():
    figure = Figure(figsize=(1, 1))
    assert figure._repr_png_().startswith(b"\x89PNG")
