"""The one way from a template of ours to a self-contained HTML page: text is escaped, a missing value is an error."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **content: Any) -> str:
    """The page that ``template`` of ``runs/templates`` makes of ``content``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coordexp.runs"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content) + "\n"
