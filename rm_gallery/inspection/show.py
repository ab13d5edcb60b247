"""The command `rm-gallery show-data`: the report on a terminal, as HTML, as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.inspection.html import MARKER, html_of
from rm_gallery.inspection.load import inspect_data
from rm_gallery.inspection.sections import page_of
from rm_gallery.inspection.terminal import print_page
from rm_gallery.training.config import load_config


def show_data(
    config_file: str | None, overrides: Sequence[str], *, html: str | None, as_json: bool, samples: int
) -> None:
    """Print what the model will see, as text or as JSON, and write the same as an HTML file if one is named."""
    if samples < 0:
        raise UserError(f"--samples={samples}: must be at least 0")
    target = _check_target(html) if html is not None else None
    config = load_config(config_file, overrides, only_data=True)
    report = inspect_data(config, num_samples=samples)
    page = page_of(report)
    if target is not None:
        _write(target, html_of(page))
    if as_json:
        facts = {**report.as_dict(), "verdicts": [{"level": v.level, "text": v.text} for v in page.verdicts]}
        print(json.dumps(_finite(facts), indent=2))
        return
    print_page(page)
    if target is not None:
        print(f"\nreport: {html}")


def _check_target(html: str) -> Path:
    """The file to write; refused before the data are read, when it cannot be written or is something else."""
    path = Path(html).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise UserError(f"--html={html}: {what}; name a file, as report.html")
    if path.exists() and not _is_ours(path):
        raise UserError(f"--html={html}: the file is there and is no report of this command; name another one")
    return path


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARKER.encode() in file.read(1000)


def _write(path: Path, text: str) -> None:
    """Under another name first, so that a report is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--html={path}: cannot be written ({error.strerror}); name another file") from error


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
