"""The console: a progress bar on a terminal, plain lines elsewhere, and a closing table."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rm_gallery.progress_bar import Bar
from rm_gallery.training.trackers.base import METRICS_NAME, RunInfo

# Metric -> its label and format in a line, in this order. Every val/ metric follows under its full name.
LINE_FIELDS = {
    "train/loss": ("loss", ".4f"),
    "train/accuracy": ("accuracy", ".3f"),
    "train/margin": ("margin", ".3f"),
    "train/lr": ("lr", ".2e"),
    "train/grad_norm": ("grad_norm", ".3g"),
    "perf/pairs_per_second": ("pairs/s", ".1f"),
}
TABLE_COLUMNS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
MAX_TABLE_ROWS = 12
SECONDS_BETWEEN_LINES = 2.0
RATE_WINDOW = 50  # log calls that the time left is estimated from


class ConsoleTracker:
    """Shows the run on standard error, where the log goes too: live if it is a terminal, else as lines to search.

    Lines are thinned to one per two seconds; the first, the last and those with validation results always show.
    """

    def __init__(
        self, run: RunInfo, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._total = run.total_steps
        self._start_time = clock()
        self._step = run.start_step
        self._times: deque[tuple[float, int]] = deque([(self._start_time, run.start_step)], maxlen=RATE_WINDOW)
        self._is_first_interval = True
        self._last_line_time = -math.inf
        self._latest: dict[str, float] = {}
        self._val_points: list[dict[str, float]] = []
        self._closed = False
        if run.start_step:
            self._recall(run.run_dir / METRICS_NAME)
        self._bar: Bar | None = None
        # Asked here, not left to rich, which takes FORCE_COLOR for a terminal and fills a log file with control codes.
        if self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._bar = Bar(self._stream, run.total_steps, run.start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = self._clock()
        self._note_time(now, step)
        self._step = step
        self._latest.update(metrics)
        has_val = any(name.startswith("val/") for name in metrics)
        if has_val:
            self._note_val(metrics, step)
        eta = self._time_left()
        if self._bar:
            self._bar.show(step, self._latest, eta)
            if has_val:
                self._bar.print(self._line(metrics, step, ""))
        elif has_val or step >= self._total or now - self._last_line_time >= SECONDS_BETWEEN_LINES:
            self._last_line_time = now
            self._print(self._line(metrics, step, eta))

    def close(self, *, failed: bool = False) -> None:
        """Take the bar away and print the table; `failed` only changes the last line."""
        if self._closed:
            return
        self._closed = True
        header, *rows = closing_table(self._val_points or self._last_point())
        if self._bar:
            self._bar.stop()
            self._bar.print_table(header, rows)
        elif rows:
            self._print(aligned([header, *rows]))
        best = max(self._val_points, key=val_accuracy, default=None)
        if best is not None and math.isfinite(val_accuracy(best)):
            self._print(f"best val/accuracy {best['val/accuracy']:.4f} at step {best['step']:.0f}")
        word = "stopped" if failed else "finished"
        self._print(f"{word} at step {self._step}/{self._total} after {duration(self._clock() - self._start_time)}")

    def _line(self, metrics: Mapping[str, float], step: int, eta: str) -> str:
        """One plain line, fields two spaces apart: `step 10/300  loss 0.6931  accuracy 0.500  eta 0:01:20`."""
        parts = [f"step {step}/{self._total}"]
        parts += [f"{label} {metrics[name]:{form}}" for name, (label, form) in LINE_FIELDS.items() if name in metrics]
        parts += [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("val/")]
        if metrics.get("train/bad_steps"):
            parts.append(f"bad_steps {metrics['train/bad_steps']:.0f}")
        return "  ".join([*parts, f"eta {eta}"] if eta else parts)

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _note_time(self, now: float, step: int) -> None:
        """Remember when a step was logged; a second call for the same step counts as part of it."""
        if step == self._times[-1][1]:
            return
        self._times.append((now, step))
        if self._is_first_interval and len(self._times) == 3:
            self._times.popleft()  # the first step loads and compiles: not the rate of the rest
            self._is_first_interval = False

    def _time_left(self) -> str:
        """Hours, minutes and seconds to the last step at the recent rate, or '' before the first step."""
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return ""
        return duration((self._total - last_step) * (last_time - first_time) / (last_step - first_step))

    def _recall(self, path: Path) -> None:
        """On resume: what was logged up to the checkpoint, so that the closing table shows the whole run."""
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            self._latest.update(row)
            if any(name.startswith("val/") for name in row):
                self._note_val(row, int(row["step"]))

    def _note_val(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep a row for the table: this validation beside the latest training values."""
        row = {name: self._latest[name] for name in TABLE_COLUMNS if name in self._latest}
        row = {name: value for name, value in row.items() if name in metrics or not name.startswith("val/")}
        self._val_points.append({"step": step, **row})

    def _last_point(self) -> list[dict[str, float]]:
        """Without validation: the last training values as the only row, or none before the first step."""
        row = {name: self._latest[name] for name in TABLE_COLUMNS if name in self._latest}
        return [{"step": self._step, **row}] if row else []


def val_accuracy(point: Mapping[str, float]) -> float:
    """The point's val/accuracy; minus infinity when it is missing or NaN, so that it never is the best."""
    value = point.get("val/accuracy", math.nan)
    return -math.inf if math.isnan(value) else value


def closing_table(points: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """A header, then a row per point: at most 12, evenly thinned, the first and the last among them."""
    last = len(points) - 1
    if last >= MAX_TABLE_ROWS:
        points = [points[round(i * last / (MAX_TABLE_ROWS - 1))] for i in range(MAX_TABLE_ROWS)]
    rows = [[f"{point['step']:.0f}", *(cell(point.get(name)) for name in TABLE_COLUMNS)] for point in points]
    return [["step", *TABLE_COLUMNS], *rows]


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, each column right-aligned, two spaces between columns."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as 0:01:20, whole seconds; a day or more as `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds)))
