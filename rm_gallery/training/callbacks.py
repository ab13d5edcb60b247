"""Callbacks of a run: functions of the caller that get metrics and checkpoints as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rm_gallery.training.checkpoint import Progress
from rm_gallery.training.checkpoint.folders import step_of
from rm_gallery.training.trainer import MetricSink, Saver


@dataclass(frozen=True)
class Callbacks:
    """Functions that the main process (rank 0) calls. An exception that one raises ends the run."""

    on_step: Callable[[int, Mapping[str, float]], None] | None = None
    """With the step and its training metrics."""
    on_validation: Callable[[int, Mapping[str, float]], None] | None = None
    """With the step and its validation metrics."""
    on_save: Callable[[int, Path], None] | None = None
    """With the step and the folder of a checkpoint, once it is complete."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Call `on_validation` if the metrics are those of a validation, otherwise `on_step`."""
        function = self.on_validation if any(name.startswith("val/") for name in metrics) else self.on_step
        if function is not None:
            function(step, metrics)


class Sinks:
    """Passes metrics to the trackers, then to the callbacks."""

    def __init__(self, *sinks: MetricSink) -> None:
        self._sinks = sinks

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for sink in self._sinks:
            sink.log(metrics, step)


class AnnouncedSaver:
    """Calls a function with the step and the folder of each checkpoint, once it is complete."""

    def __init__(self, saver: Saver, on_save: Callable[[int, Path], None] | None) -> None:
        self._saver, self._on_save = saver, on_save
        self._announced = saver.latest

    @property
    def latest(self) -> Path | None:
        return self._saver.latest

    def save(self, progress: Progress, sums: Mapping[str, float], *, is_last: bool = False) -> None:
        self.wait()
        self._saver.save(progress, sums, is_last=is_last)
        self._announce()

    def has_failed(self) -> bool:
        return self._saver.has_failed()

    def wait(self) -> None:
        self._saver.wait()
        self._announce()

    def describe_last_good(self, progress: Progress) -> str:
        return self._saver.describe_last_good(progress)

    def _announce(self) -> None:
        latest = self._saver.latest
        if latest is not None and latest != self._announced:
            self._announced = latest
            if self._on_save is not None:
                self._on_save(step_of(latest), latest)
