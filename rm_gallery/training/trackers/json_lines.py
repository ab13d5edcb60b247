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
    A resumed run appends; steps that the lost part had logged already appear twice, and the later line counts.
    """

    def __init__(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        path = run.run_dir / METRICS_NAME
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


def drop_partial_line(path: Path) -> None:
    """Cut what follows the last newline: a line that a killed process did not finish. No file is fine."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
