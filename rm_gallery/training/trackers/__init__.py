"""Trackers log the metrics of a run: metrics.jsonl always; others by `trainer.logger`.

A tracker that cannot start raises before training. One that fails later is disabled with a warning, and training
continues: a full disk or a lost connection must not end the run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rm_gallery.errors import UserError, nearest, one_line
from rm_gallery.training.trackers.base import IDS_NAME, METRICS_NAME, JsonLines, RunInfo, Tracker, TrackerConfig
from rm_gallery.training.trackers.console import ConsoleTracker
from rm_gallery.training.trackers.services import (
    MlflowTracker,
    SwanlabTracker,
    TensorboardTracker,
    TrackioTracker,
    WandbTracker,
)

__all__ = ["IDS_NAME", "METRICS_NAME", "TRACKERS", "RunInfo", "Tracker", "TrackerConfig", "Trackers"]

log = logging.getLogger(__name__)

TRACKERS: dict[str, Callable[[RunInfo], Tracker]] = {
    "console": ConsoleTracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "swanlab": SwanlabTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}

OFFLINE_HELP = {
    "wandb": "run `wandb login`, set WANDB_MODE=offline",
    "swanlab": "run `swanlab login`, set SWANLAB_MODE=offline",
    "mlflow": "fix or unset MLFLOW_TRACKING_URI (without it, mlflow.db in the run directory is used)",
    "trackio": "fix or unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
}


class Trackers:
    """All trackers of a run, on rank 0. The run directory is created if needed."""

    def __init__(self, names: Sequence[str], run: RunInfo) -> None:
        for name in names:
            if name not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise UserError(f"trainer.logger: no tracker {name!r}; known are {known}.{nearest(name, TRACKERS)}")
        self._active: dict[str, Tracker] = {}
        self._broken: dict[str, Tracker] = {}
        self._closed = False
        try:
            self._active[METRICS_NAME] = JsonLines(run)
        except OSError as error:
            raise UserError(f"cannot write {METRICS_NAME} ({one_line(error)}): check the run directory") from error
        # The console starts last, so that no other package prints into its bar.
        for name in sorted(dict.fromkeys(names), key=lambda name: name == "console"):
            try:
                self._active[name] = TRACKERS[name](run)
            except Exception as error:
                self.close(failed=True)
                raise UserError(cannot_start(name, error)) from error
            except BaseException:  # Ctrl-C while a service connects
                self.close(failed=True)
                raise

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step to all trackers. A failing tracker is disabled with a warning."""
        for name, tracker in list(self._active.items()):
            try:
                tracker.log(metrics, step)
            except Exception as error:
                self._broken[name] = self._active.pop(name)
                log.warning("%s failed at step %d and is disabled: %s", name, step, one_line(error))

    def tick(self, text: str) -> None:
        """Show on the console how far a long step is."""
        console = self._active.get("console")
        if isinstance(console, ConsoleTracker):
            console.tick(text)

    def attach(self, files: Sequence[Path]) -> None:
        """Store the final report with the run in all trackers. One that fails gets a warning."""
        for name, tracker in self._active.items():
            try:
                for file in files:
                    tracker.attach(file)
            except Exception as error:
                log.warning("%s did not store the report: %s", name, one_line(error))

    def close(self, *, failed: bool = False) -> None:
        """Close all, the console first. failed: mark the run as failed. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for name, tracker in reversed(self._active.items()):
            try:
                tracker.close(failed=failed)
            except Exception as error:
                log.warning("%s failed while closing: %s", name, one_line(error))
        for tracker in self._broken.values():  # already warned about
            with contextlib.suppress(Exception):
                tracker.close(failed=True)


class NoTrackers:
    """Does nothing: the trackers of ranks above 0."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def tick(self, text: str) -> None: ...

    def attach(self, files: Sequence[Path]) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


def cannot_start(name: str, error: Exception) -> str:
    """Error message for a tracker that cannot start: which one, why, and what to do."""
    if isinstance(error, ImportError):
        return (
            f"trainer.logger: {name} is not installed ({one_line(error)}): "
            f"pip install 'rm-gallery[{name}]', or drop {name} from trainer.logger"
        )
    help_text = f"{OFFLINE_HELP[name]}, or drop" if name in OFFLINE_HELP else "fix that, or drop"
    return f"trainer.logger: {name} cannot start ({one_line(error)}): {help_text} {name} from trainer.logger"
