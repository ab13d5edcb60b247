"""metrics.jsonl: one JSON object per log call, appended and flushed, so that it survives a crash."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rm_gallery.training.trackers.base import METRICS_NAME, RunInfo


class JsonLines:
    """Appends `{"step": n, "time": unix seconds, metric: value, ...}` per log call.

    A value that is not finite becomes null: JSON has no NaN, and strict readers (jq, a browser) refuse the whole line.
    A resumed run goes on behind its checkpoint: what the lost part had logged after that is dropped first, so every
    step is there once.
    """

    def __init__(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        path = run.run_dir / METRICS_NAME
        if run.start_step:
            drop_lost_rows(path, run.start_step, repeats_validation=run.repeats_validation)
        else:
            drop_partial_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        record: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: finite_or_none(value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        self._file.close()


def finite_or_none(value: float) -> float | None:
    """The value as a plain int or float (numpy and one-element tensors too); None for NaN and infinities."""
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def drop_lost_rows(path: Path, last_step: int, *, repeats_validation: bool = False) -> None:
    """Cut the rows of later steps out, and lines that are no rows; at once or not at all. No file is fine.

    repeats_validation: rows with `val/` metrics of the last step go too.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
            step = row["step"]
            repeated = repeats_validation and step == last_step and any(name.startswith("val/") for name in row)
        except (ValueError, TypeError, KeyError):
            continue
        if step <= last_step and not repeated and line.endswith("\n"):
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def drop_partial_line(path: Path) -> None:
    """Cut what follows the last newline: a line that a killed process did not finish. No file is fine."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
