"""Console: a progress bar on a terminal, plain lines elsewhere, and a final table; nothing is wider than 80 columns."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rm_gallery.progress_bar import ProgressBar, is_terminal
from rm_gallery.safe_text import visible
from rm_gallery.training.metric_names import parse_metric, value_to_compare
from rm_gallery.training.trackers.base import METRICS_NAME, RunInfo

# Metric -> its text in a line, in this order. val/ metrics follow under their full names.
LINE_FIELDS = {
    "train/loss": "loss {:.4f}",
    "train/accuracy": "accuracy {:.3f}",
    "train/token_accuracy": "token accuracy {:.3f}",
    "train/lr": "lr {:.1e}",
    "perf/pairs_per_second": "{:.0f} pairs/s",
    "perf/conversations_per_second": "{:.1f} conversations/s",
}
BAR_FIELDS = {
    "train/loss": "loss {:.4f}",
    "train/accuracy": "accuracy {:.3f}",
    "train/token_accuracy": "token accuracy {:.3f}",
    "perf/pairs_per_second": "{:.1f} pairs/s",
    "perf/conversations_per_second": "{:.1f} conversations/s",
}
TABLE_COLUMNS = (
    "train/loss", "train/accuracy", "train/token_accuracy", "val/loss", "val/accuracy", "val/token_accuracy",
)  # fmt: skip
WIDTH = 80  # columns of a line; longer ones are wrapped between their fields
MAX_TABLE_ROWS = 12
LINE_INTERVAL_S = 2.0
TICK_INTERVAL_S = 30.0
BAR_INTERVAL_S = 0.25
RATE_WINDOW = 50  # number of log calls that the remaining time is estimated from


class ConsoleTracker:
    """Shows metrics on standard error: a progress bar on a terminal, else plain lines.

    At most one line per two seconds is printed; the first, the last and those with validation metrics always are.
    """

    def __init__(
        self, run: RunInfo, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._total, self._metric = run.total_steps, run.best_metric
        self._start_time = clock()
        self._step = run.start_step
        self._times: deque[tuple[float, int]] = deque([(self._start_time, run.start_step)], maxlen=RATE_WINDOW)
        self._is_first_interval = True
        self._last_line_time = self._last_tick = -math.inf
        self._latest: dict[str, float] = {}
        self._val_points: list[dict[str, float]] = []
        self._since_val: dict[str, list[float]] = {}  # training metrics logged since the last validation
        self._closed = False
        if run.start_step:
            self._recall(run.run_dir / METRICS_NAME)
        self._bar: ProgressBar | None = None
        if is_terminal(self._stream):
            self._bar = ProgressBar("step", run.total_steps, run.start_step, stream=self._stream, times=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = self._clock()
        self._note_time(now, step)
        self._step = step
        self._note(metrics)
        has_val = any(name.startswith("val/") for name in metrics)
        if has_val:
            self._note_val(metrics, step)
        eta = self._time_left()
        if self._bar:
            self._bar.update(step, self._bar_text(eta))
            if has_val:
                self._bar.print(self._line(metrics, step, ""))
        elif has_val or step >= self._total or now - self._last_line_time >= LINE_INTERVAL_S:
            self._last_line_time = now
            self._print(self._line(metrics, step, eta))

    def tick(self, text: str) -> None:
        """Show how far a step or a validation is: in the bar, or as a line where nothing was printed for 30 s."""
        now = self._clock()
        if self._bar:
            last_step = self._times[-1][0]
            if now - last_step >= LINE_INTERVAL_S and now - self._last_tick >= BAR_INTERVAL_S:
                self._last_tick = now
                eta = self._time_left()
                self._bar.update(self._step, f"{text}  {eta} left" if eta else text)
        elif now - max(self._last_line_time, self._start_time, self._last_tick) >= TICK_INTERVAL_S:
            self._last_tick = now
            self._print(f"step {self._step}/{self._total} done  {text}")

    def attach(self, file: Path) -> None: ...

    def close(self, *, failed: bool = False) -> None:
        """Remove the bar and print the table; `failed` only changes the last line."""
        if self._closed:
            return
        self._closed = True
        header, *rows = closing_table(self._val_points or self._last_point())
        if self._bar:
            self._bar.close()
        if rows:
            self._print(aligned([header, *rows]))
        best = max(self._val_points, key=self._compared, default=None)
        if best is not None and math.isfinite(self._compared(best)):
            self._print(f"best {self._metric} {best[self._metric]:.4f} at step {best['step']:.0f}")
        word = "stopped" if failed else "finished"
        self._print(f"{word} at step {self._step}/{self._total} after {duration(self._clock() - self._start_time)}")

    def _line(self, metrics: Mapping[str, float], step: int, eta: str) -> str:
        """A plain line: `step 10/300  loss 0.6931  accuracy 0.500  eta 0:01:20`."""
        parts = [f"step {step}/{self._total}"]
        parts += [form.format(metrics[name]) for name, form in LINE_FIELDS.items() if name in metrics]
        parts += [f"{name} {value:.4f}" for name, value in metrics.items() if is_shown(name)]
        if metrics.get("train/bad_steps"):
            parts.append(f"bad_steps {metrics['train/bad_steps']:.0f}")
        return wrapped([*parts, f"eta {eta}"] if eta else parts)

    def _bar_text(self, eta: str) -> str:
        """The latest metrics: `loss 0.5123  accuracy 0.790  45.1 pairs/s  0:01:20 left  val 0.800`."""
        parts = [form.format(self._latest[name]) for name, form in BAR_FIELDS.items() if name in self._latest]
        parts += [f"{eta} left"] if eta else []
        parts += [f"val {self._latest['val/accuracy']:.3f}"] if "val/accuracy" in self._latest else []
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        self._stream.write(visible(text) + "\n")
        self._stream.flush()

    def _note_time(self, now: float, step: int) -> None:
        """Record when a step was logged; a second call for the same step is ignored."""
        if step == self._times[-1][1]:
            return
        self._times.append((now, step))
        if self._is_first_interval and len(self._times) == 3:
            self._times.popleft()  # the first step includes compilation
            self._is_first_interval = False

    def _time_left(self) -> str:
        """Remaining time at the recent rate, as h:mm:ss; '' before the first step."""
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return ""
        return duration((self._total - last_step) * (last_time - first_time) / (last_step - first_step))

    def _recall(self, path: Path) -> None:
        """On resume: read the metrics up to the checkpoint, so that the final table shows the whole run."""
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            self._note(row)
            if any(name.startswith("val/") for name in row):
                self._note_val(row, int(row["step"]))

    def _note(self, metrics: Mapping[str, float]) -> None:
        self._latest.update(metrics)
        for name in TABLE_COLUMNS:
            if name in metrics and name.startswith("train/"):
                self._since_val.setdefault(name, []).append(metrics[name])

    def _means(self) -> dict[str, float]:
        """Means of the training metrics since the last validation: those of one step say little."""
        return {name: sum(values) / len(values) for name, values in self._since_val.items()}

    def _note_val(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep a row for the table: this validation, and the training metrics since the one before."""
        row = {name: metrics[name] for name in (*TABLE_COLUMNS, self._metric) if name in metrics}
        self._val_points.append({"step": step, **self._means(), **row})
        self._since_val = {}

    def _compared(self, point: Mapping[str, float]) -> float:
        """The metric of the best checkpoint, higher for a better one; minus infinity if it is missing or NaN."""
        value = value_to_compare({self._metric: point.get(self._metric, math.nan)}, self._metric)
        return -math.inf if math.isnan(value) else value

    def _last_point(self) -> list[dict[str, float]]:
        """Without validation: a single row of the training metrics, if any."""
        means = self._means()
        return [{"step": self._step, **means}] if means else []


def is_shown(name: str) -> bool:
    """Whether a line shows this `val/` metric: of a set, those of its sources and parts are only in the log files."""
    parsed = parse_metric(name)
    return name.startswith("val/") and not (parsed and parsed.set and parsed.source)


def wrapped(parts: Sequence[str]) -> str:
    """Parts joined by two spaces, with a new, indented line where one would be wider than a terminal."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] += f"  {part}"
    return "\n".join(lines)


def closing_table(points: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """A header, then at most 12 evenly spaced rows including the first and the last.

    The accuracy is that of pairs, or of tokens where there is one.
    """
    last = len(points) - 1
    if last >= MAX_TABLE_ROWS:
        points = [points[round(i * last / (MAX_TABLE_ROWS - 1))] for i in range(MAX_TABLE_ROWS)]
    of_tokens = any("train/token_accuracy" in point or "val/token_accuracy" in point for point in points)
    columns = [name for name in TABLE_COLUMNS if "accuracy" not in name or ("token" in name) == of_tokens]
    rows = [[f"{point['step']:.0f}", *(cell(point.get(name)) for name in columns)] for point in points]
    return [["step", *columns], *rows]


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows with right-aligned columns, two spaces apart."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format seconds as `0:01:20` or `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds)))
