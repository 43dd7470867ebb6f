"""Export a notebook as one HTML file whose views are pictures, and which loads nothing from the network."""

from __future__ import annotations

import re
from typing import Any

from nbconvert import HTMLExporter
from traitlets import default

_SCRIPT = re.compile(r"<script[^>]*\bsrc=[\"']https?://[^>]*>.*?</script>", re.DOTALL)
_WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookHTML(HTMLExporter):
    """nbconvert's HTML exporter, for notebooks with views: `jupyter nbconvert --to workbench_html notebook.ipynb`.

    The ordinary one shows a view by a script from the network, even if the notebook has an image of it.
    """

    export_from_notebook = "HTML with the views as pictures"

    @default("embed_images")
    def _embed_images(self) -> bool:
        return True

    def from_notebook_node(self, nb: Any, resources: Any = None, **options: Any) -> Any:
        """Return `(html, resources)`; the notebook itself is not changed."""
        nb = nb.copy()
        nb.metadata = {key: value for key, value in nb.metadata.items() if key != "widgets"}
        cells = []
        for cell in nb.cells:
            if "outputs" in cell:
                cell = cell.copy()
                cell.outputs = [_as_picture(output) for output in cell.outputs]
            cells.append(cell)
        nb.cells = cells
        html, found = super().from_notebook_node(nb, resources, **options)
        return _SCRIPT.sub("", html), found


def _as_picture(output: Any) -> Any:
    """The output without its view; what remains is its image or, without one, its text."""
    if _WIDGET not in output.get("data", {}):
        return output
    output = output.copy()
    output.data = {kind: value for kind, value in output.data.items() if kind != _WIDGET}
    return output
