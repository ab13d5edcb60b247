"""Writes `report.html` of a run after each validation and at its end, report.json, and logs its findings once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from rm_gallery.errors import one_line
from rm_gallery.files import write_text
from rm_gallery.training.report.findings import findings
from rm_gallery.training.report.history import read_run
from rm_gallery.training.report.page import page_of

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
SUMMARY_NAME = "report.json"


class ReportWriter:
    """Receives the metrics of a run. An error is a warning, after which nothing is written: it must not end the run."""

    def __init__(self, run_dir: Path) -> None:
        """run_dir: with config.yaml, run.json and metrics.jsonl, those of earlier starts included."""
        self._path = run_dir / REPORT_NAME
        self._run = replace(read_run(run_dir), name=run_dir.name)
        self._known: set[str] = set()
        self._has_failed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.history.add(metrics, step)
        if any(name.startswith("val/") for name in metrics):
            self.write()

    def write(self) -> Path | None:
        """The path of the report; None if it cannot be written."""
        if self._has_failed:
            return None
        try:
            for each in findings(self._run):
                if each.key not in self._known:
                    self._known.add(each.key)
                    log.warning("%s; try: %s", each.text, each.advice)
            write_text(self._path, page_of([self._run]))
        except Exception as error:
            self._has_failed = True
            log.warning("%s cannot be written and is omitted: %s", self._path, one_line(error))
            return None
        return self._path

    def finish(self) -> list[Path]:
        """Write the report and report.json, its figures; the paths of what was written."""
        page = self.write()
        if page is None:
            return []
        summary = self._path.with_name(SUMMARY_NAME)
        last = {name: points[-1][1] for name, points in self._run.history.series.items()}
        figures = {
            "run": self._run.name,
            "step": self._run.history.last_step,
            "total_steps": self._run.total_steps,
            "findings": [asdict(each) for each in findings(self._run)],
            "metrics": last,
            "facts": self._run.facts,
        }
        try:
            write_text(summary, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s cannot be written and is omitted: %s", summary, one_line(error))
            return [page]
        return [page, summary]
