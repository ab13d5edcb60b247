"""The metrics of a run over its steps, and what config.yaml and run.json say about it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from rm_gallery.errors import UserError
from rm_gallery.training.metric_names import parse_metric
from rm_gallery.training.run_dir import CONFIG_NAME, FACTS_NAME
from rm_gallery.training.trackers import METRICS_NAME

Points: TypeAlias = list[tuple[int, float]]
"""(step, value) of a metric, in order."""


@dataclass
class History:
    """Metrics by name. Values that are not finite are omitted."""

    series: dict[str, Points] = field(default_factory=dict)
    last_step: int = 0

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        """The metrics of one log line."""
        self.last_step = max(self.last_step, step)
        for name, value in metrics.items():
            if type(value) in (int, float) and math.isfinite(value):
                self.series.setdefault(name, []).append((step, float(value)))

    def points(self, name: str) -> Points:
        return self.series.get(name, [])

    def sets(self) -> list[str]:
        """Names of what was validated: "" for the validation data, and those of `trainer.eval_sets`."""
        parsed = (parse_metric(name) for name in self.series)
        return list(dict.fromkeys(each.set for each in parsed if each is not None))


@dataclass(frozen=True)
class Run:
    """A run directory as a report shows it."""

    name: str
    history: History
    config: Mapping[str, Any]
    """As config.yaml; empty if there is none."""
    facts: Mapping[str, Any]
    """As run.json; empty if there is none."""

    @property
    def total_steps(self) -> int:
        steps = self.facts.get("total_steps")
        return steps if isinstance(steps, int) and steps > 0 else self.history.last_step

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration; None if it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_run(folder: Path) -> Run:
    """A run from its directory. Lines that cannot be read, such as one that is being written, are skipped.

    Raises UserError if there is no metrics.jsonl.
    """
    folder = folder.expanduser()
    history = History()
    try:
        text = (folder / METRICS_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{folder}: no run ({METRICS_NAME} cannot be read: {error.strerror}); give a run directory"
        ) from error
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            history.add({name: value for name, value in row.items() if name not in ("step", "time")}, row["step"])
    return Run(folder.resolve().name, history, _mapping(folder / CONFIG_NAME), _mapping(folder / FACTS_NAME))


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file with a mapping; {} for another one."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def smooth(points: Sequence[tuple[int, float]], reach: int | None = None) -> Points:
    """Moving average over a fifteenth of the curve, or over `reach` points at each side."""
    reach = max(1, len(points) // 30) if reach is None else reach
    total, sums = 0.0, [0.0]
    for _, value in points:
        total += value
        sums.append(total)
    smoothed = []
    for index, (step, _) in enumerate(points):
        low, high = max(0, index - reach), min(len(points), index + reach + 1)
        smoothed.append((step, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def thin(points: Sequence[tuple[int, float]], most: int) -> Points:
    """At most `most` points: means of neighbors, the last point as it is."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most - 1))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(group[len(group) // 2][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [*means[:-1], points[-1]]
