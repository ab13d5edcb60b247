"""What a tracker is: its settings, what it is told about the run, and the two calls it answers; and metrics.jsonl.

That file has one JSON object per log call, appended and flushed, so that it survives a crash.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rm_gallery.files import write_text

IDS_NAME = "tracker_ids.json"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class TrackerConfig:
    """The tracking part of the `trainer:` section."""

    __pydantic_config__ = {"extra": "forbid"}

    logger: tuple[str, ...] = ("console",)
    """Where metrics go besides metrics.jsonl: any of console, tensorboard, wandb, swanlab."""

    project_name: str = "rm-gallery"
    """The project that wandb and swanlab file the run under."""

    experiment_name: str = "bt"
    """The name that wandb and swanlab show for the run."""

    log_freq: int = 1
    """Optimizer steps between two log lines."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know about the run it follows."""

    project_name: str
    experiment_name: str
    run_dir: Path
    config: Mapping[str, Any]
    """The resolved configuration, nested as in the YAML file."""

    total_steps: int
    start_step: int = 0
    """The last step that is already done: 0 for a new run, the checkpoint's step on resume."""
    repeats_validation: bool = False
    """The validation of `start_step` is made again: what was logged of it does not count."""


class Tracker(Protocol):
    """One place that metrics go to. May raise: `Trackers` turns that into one warning."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step; steps count from 1 and do not decrease. Values may be NaN."""

    def close(self, *, failed: bool = False) -> None:
        """Write out what is buffered and let go of files, threads and the terminal; `failed` marks the run so."""


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
    write_text(path, "".join(kept))


def drop_partial_line(path: Path) -> None:
    """Cut what follows the last newline: a line that a killed process did not finish. No file is fine."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
