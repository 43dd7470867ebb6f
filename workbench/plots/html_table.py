"""Tables in HTML, for views and reports: one template, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

ENVIRONMENT = Environment(
    loader=PackageLoader("workbench.plots", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", *, folded: bool = False
) -> Markup:
    """Return an HTML table of text cells, which are escaped; `folded` hides it until its title is clicked."""
    return Markup(ENVIRONMENT.get_template("table.html").render(header=header, rows=rows, title=title, folded=folded))
