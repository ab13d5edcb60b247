"""Runs of a benchmark in a file of JSON lines, so that an interrupted benchmark continues where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def complete(file: Path, cells: Iterable[dict[str, Any]], run: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs of the file, after `run(**cell)` for each cell that no line of it has; a line is appended for each."""
    from transformers.utils import logging as transformers_logging

    from rm_gallery.log import setup_logging

    setup_logging(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for cell in cells:
        if not any(cell.items() <= each.items() for each in runs):
            runs.append(cell | run(**cell))
            print(json.dumps(runs[-1]), flush=True)
            with file.open("a") as lines:
                lines.write(json.dumps(runs[-1]) + "\n")
    return runs
