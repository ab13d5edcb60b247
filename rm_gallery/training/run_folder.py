"""The run folder explains itself: resolved configuration, versions, commit, data, and curves."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.training.trackers import METRICS_NAME

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
FACTS_NAME = "run.json"
CURVES_NAME = "curves.png"
_PACKAGES = ("rm-gallery", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


def write_run_facts(run_dir: Path, config_yaml: str, facts: Mapping[str, Any]) -> None:
    """Make the run folder and write config.yaml and run.json; metrics of an earlier start keep another name.

    Raises UserError when the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / METRICS_NAME
        if metrics.exists():
            stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(metrics.stat().st_mtime))
            metrics.rename(run_dir / f"metrics-{stamp}.jsonl")
        (run_dir / CONFIG_NAME).write_text(config_yaml, encoding="utf-8")
        (run_dir / FACTS_NAME).write_text(json.dumps({**_program(), **facts}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{run_dir}: the run folder cannot be written ({error}); set trainer.default_local_dir"
        ) from error


def _program() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree, with `-dirty` when it has changes; None outside a git checkout of this project."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a metrics.jsonl as (step, value) pairs; values that were not finite are left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


def draw_curves(run_dir: Path) -> Path | None:
    """Draw loss and accuracy over steps as curves.png; None when matplotlib is not installed (extra `plot`)."""
    try:
        import matplotlib
    except ImportError:
        log.info("no curves.png: matplotlib is not installed (pip install 'rm-gallery[plot]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = read_metrics(run_dir / METRICS_NAME)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, name, label in ((axes[0], "loss", "Bradley-Terry loss"), (axes[1], "accuracy", "pairwise accuracy")):
        train, val = series.get(f"train/{name}", []), series.get(f"val/{name}", [])
        if train:
            axis.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
            axis.plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="train (smoothed)")
        if val:
            axis.plot(*zip(*val, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[1].axhline(0.5, color="gray", linestyle=":", linewidth=1)
    figure.suptitle(run_dir.name)
    path = run_dir / CURVES_NAME
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean of each point and its neighbours, over a fifteenth of the curve."""
    reach = max(1, len(points) // 30)
    smoothed = []
    for index, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, index - reach) : index + reach + 1]]
        smoothed.append((step, sum(near) / len(near)))
    return smoothed
