"""The files of a report: JSON, HTML and Markdown, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.evaluation.html import MARKER, html_of
from rm_gallery.evaluation.report import as_markdown
from rm_gallery.files import renew_in_manifests, write_text
from rm_gallery.html_page import is_foreign
from rm_gallery.safe_text import redact

_CARD_START, _CARD_END = "<!-- rm-gallery evaluate -->", "<!-- end of rm-gallery evaluate -->"


def text_of(evaluation: Mapping[str, Any], kind: str, target: Path, *, command: str = "") -> str:
    """The report as `json`, `html` or `markdown`, without secrets. A model card at the target gets it as a section."""
    shown = redact(dict(evaluation))
    if kind == "json":
        return json.dumps(shown, indent=1, allow_nan=False) + "\n"
    if kind == "html":
        return html_of(shown, command=redact(command))
    card = _model_card(target)
    return _in_card(card, as_markdown(shown)) if card else as_markdown(shown)


def _model_card(target: Path) -> str:
    """The text of a file that begins with the metadata of a model card; empty for any other."""
    text = target.read_text(encoding="utf-8") if target.is_file() else ""
    return text if text.startswith("---\n") else ""


def _in_card(card: str, report: str) -> str:
    """The model card with the report in place of an earlier one, else before its section on use, else at its end."""
    section = f"{_CARD_START}\n{report}{_CARD_END}\n"
    before, start, rest = card.partition(f"{_CARD_START}\n")
    if start and _CARD_END in rest:
        return before + section + rest.partition(f"{_CARD_END}\n")[2]
    before, use, rest = card.partition("\n## How to use")
    return f"{before.rstrip()}\n\n{section}{use}{rest}"


def check_target(path: str, option: str, kind: str) -> Path:
    """The file of an option, checked before anything is scored.

    Raises UserError for a folder, a missing folder, a device, a file that cannot be read, and for another file in the
    place of an HTML report.
    """
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise UserError(f"{option} {path}: {what}; name a file")
    if target.exists() and not target.is_file():
        raise UserError(f"{option} {path}: is no regular file; name another one")
    try:
        is_taken = kind == "html" and is_foreign(target, MARKER)
        if kind == "markdown":
            _model_card(target)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{option} {path}: the file exists and cannot be read ({reason}); name another one") from error
    if is_taken:
        raise UserError(f"{option} {path}: the file exists and is not a report of this command; name another one")
    return target


def write_report(path: Path, text: str, option: str) -> None:
    """Write a file of the report atomically; raises UserError if it cannot be written.

    A model card stays one of the files that its checkpoint's manifest lists.
    """
    try:
        write_text(path, text)
        renew_in_manifests(path)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); choose another file") from error
