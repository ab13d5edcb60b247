"""What the tracker tests share: a small run, its metrics, and a stream that says it is a terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from rm_gallery.training.trackers import RunInfo, Tracker, Trackers

CONFIG = {"trainer": {"learning_rate": 0.0001, "output_dir": Path("runs/a")}, "data": {"path": "pairs.jsonl"}}
PLAIN_CONFIG = {"trainer": {"learning_rate": 0.0001, "output_dir": "runs/a"}, "data": {"path": "pairs.jsonl"}}
LOG_CALLS: list[tuple[int, dict[str, float]]] = [
    (1, {"train/loss": 0.75, "train/accuracy": 0.5, "train/lr": 0.0001}),
    (2, {"train/loss": 0.5, "train/accuracy": 0.75, "train/lr": 0.0002}),
    (2, {"val/loss": 0.625, "val/accuracy": math.nan}),
]
FACTS = {"versions": {"torch": "2"}, "data_fingerprints": {"train": "abc"}}
PAGE, REPORT = "<html>a report</html>", {"metrics": {"train/loss": 0.5}}


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make_run(tmp_path: Path, *, start_step: int = 0, total_steps: int = 2) -> RunInfo:
    return RunInfo("a-project", "an-experiment", tmp_path / "run", CONFIG, total_steps, start_step)


def log_all(tracker: Tracker | Trackers) -> None:
    for step, metrics in LOG_CALLS:
        tracker.log(metrics, step)


def write_report(run_dir: Path) -> list[Path]:
    """The files of a final report."""
    page, figures = run_dir / "report.html", run_dir / "report.json"
    page.write_text(PAGE)
    figures.write_text(json.dumps(REPORT))
    return [page, figures]
