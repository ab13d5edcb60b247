"""HTML files of reports: one look (`html_page.html.jinja`), escaped text, and nothing that is loaded from elsewhere.

render(template, marker, ...)   the whole file as text
is_foreign(path, marker)        whether a file exists that is no report of this kind
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from rm_gallery.safe_text import visible, visible_line

_FOLDER = Path(__file__).parent


def render(template: str, marker: str, *, script: str = "", **values: Any) -> str:
    """A page as text. All text is escaped, and its control characters are made visible.

    template: of a folder of this package, which extends `html_page.html.jinja`. marker: written into the first lines,
    so that `is_foreign` knows the file. script: the only code that may run in the page; its content security policy
    names its hash.
    """
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            marker=marker, script=Markup(script), script_source=f"'sha256-{digest}'" if script else "'none'", **values
        )
    )


@functools.cache
def _environment() -> Any:
    """Compiles each template once: a run writes its report after every validation."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def show(value: Any) -> Any:
        """Applied to every expression of the template, before autoescape."""
        return visible_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def lines(text: str) -> Markup:
        """Text whose line breaks stay."""
        return Markup(escape(visible(text)))

    def marked_lines(text: str) -> Markup:
        """Text whose line breaks stay, and are marked."""
        return Markup(lines(text).replace("\n", Markup('<i class="dim">\\n</i>\n')))

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(lines=lines, marked_lines=marked_lines)
    return environment


def is_foreign(path: Path, marker: str) -> bool:
    """Whether something exists that is not a report with this marker, and must not be overwritten."""
    if not path.is_file():
        return path.exists()
    with path.open("rb") as file:
        return marker.encode() not in file.read(1000)
