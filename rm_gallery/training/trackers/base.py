"""The interface of trackers, their configuration, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rm_gallery.files import write_text
from rm_gallery.training.metric_names import DEFAULT_METRIC

IDS_NAME = "tracker_ids.json"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class TrackerConfig:
    """The tracking part of the `trainer:` section."""

    __pydantic_config__ = {"extra": "forbid"}

    logger: tuple[str, ...] = ("console",)
    """Where metrics go besides metrics.jsonl: any of console, tensorboard, wandb, swanlab, mlflow, trackio."""

    project_name: str = "rm-gallery"
    """Project name for wandb, swanlab and trackio; the experiment in mlflow."""

    experiment_name: str = ""
    """Name of the run directory, and of the run in trackers; default: the time and a fingerprint of the configuration,
    so that the same command resumes its run and another starts a new one."""

    log_freq: int = 1
    """Optimizer steps between two log lines."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a tracker logs."""

    project_name: str
    experiment_name: str
    run_dir: Path
    config: Mapping[str, Any]
    """The resolved configuration, nested as in the YAML file."""

    total_steps: int
    start_step: int = 0
    """The last completed step: 0 for a new run, the step of the checkpoint on resume."""
    repeats_validation: bool = False
    """The validation of `start_step` runs again, so its logged metrics are dropped."""
    best_metric: str = DEFAULT_METRIC
    """`trainer.save_best_metric`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Versions, commit and data fingerprints, which services get as `run` of the configuration."""


class Tracker(Protocol):
    """Logs metrics to one place. Errors are caught by `Trackers`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step. Steps start at 1 and do not decrease; values may be NaN."""

    def attach(self, file: Path) -> None:
        """Store a file of the final report with the run, or nothing if the tracker has no files."""

    def close(self, *, failed: bool = False) -> None:
        """Flush, and release files, threads and the terminal. failed: mark the run as failed."""


class JsonLines:
    """Appends `{"step": n, "time": unix seconds, metric: value, ...}` per log call, and flushes it.

    Non-finite values become null: JSON has no NaN, and strict parsers (jq, a browser) reject the whole line.
    On resume, rows after the checkpoint are dropped first, so that every step is logged once.
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

    def attach(self, file: Path) -> None: ...

    def close(self, *, failed: bool = False) -> None:
        self._file.close()


def finite_or_none(value: float) -> float | None:
    """Convert a number, numpy scalar or one-element tensor to int or float; None if it is not finite."""
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def drop_lost_rows(path: Path, last_step: int, *, repeats_validation: bool = False) -> None:
    """Drop rows after `last_step` and invalid lines, atomically. A missing file is ignored.

    repeats_validation: also drop rows with `val/` metrics of `last_step`.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not _is_row(row):
            continue
        step = row["step"]
        repeated = repeats_validation and step == last_step and any(name.startswith("val/") for name in row)
        if step <= last_step and not repeated and line.endswith("\n"):
            kept.append(line)
    write_text(path, "".join(kept))


def _is_row(row: Any) -> bool:
    """Whether a line of metrics.jsonl holds what `JsonLines` writes: a whole step, and numbers or null."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(value is None or type(value) in (int, float) for value in row.values())


def drop_partial_line(path: Path) -> None:
    """Truncate after the last newline: a killed process may leave a partial line. A missing file is ignored."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
