"""The page as one self-contained HTML file, from the template `report.html.jinja`."""

from __future__ import annotations

from typing import Any

from rm_gallery.inspection.page import Page
from rm_gallery.safe_text import visible, visible_line

MARKER = "rm-gallery show-data"
"""In the first lines of every report, so that no other file is overwritten."""


def html_of(page: Page) -> str:
    """The whole file as text. All text is escaped, and control characters are made visible."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def show(value: Any) -> Any:
        """Applied to every expression of the template, before autoescape."""
        return visible_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def multiline(text: str) -> Markup:
        """Text of a sample; line breaks stay, and are marked."""
        return Markup(escape(visible(text)).replace("\n", Markup('<i class="dim">\\n</i>\n')))

    environment = Environment(
        loader=PackageLoader("rm_gallery.inspection", ""),
        autoescape=True,
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["multiline"] = multiline
    return environment.get_template("report.html.jinja").render(page=page, marker=MARKER)
