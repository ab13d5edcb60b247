"""What a tracker is: its settings, what it is told about the run, and the two calls it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
