"""The run directory: lock, config.yaml, run.json (versions, commit, data, earlier starts), train.log, curves.png."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rm_gallery.errors import UserError
from rm_gallery.files import lock, write_text
from rm_gallery.safe_text import redact
from rm_gallery.training.trackers import METRICS_NAME

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
FACTS_NAME = "run.json"
CURVES_NAME = "curves.png"
LOG_NAME = "train.log"
LOCK_NAME = ".lock"
_PACKAGES = ("rm-gallery", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


@contextmanager
def lock_run_dir(run_dir: Path, *, timeout: float = 30.0) -> Iterator[None]:
    """Create the run directory and lock it, since two processes must not train in it.

    timeout: seconds to wait for a process that is ending.
    Raises UserError when the directory cannot be written or another process holds the lock.
    """

    def on_wait(holder: str) -> None:
        log.info("%s: waiting for %s to end", run_dir, holder)

    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(run_dir / LOCK_NAME, timeout=timeout, on_wait=on_wait))
        except TimeoutError as error:
            raise UserError(
                f"{run_dir}: {error} is training in this directory; stop it first, or set another "
                "trainer.experiment_name"
            ) from error
        except OSError as error:
            raise _cannot_write(run_dir, error) from error
        yield


def _cannot_write(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"{run_dir}: the run directory cannot be written ({error}); set trainer.default_local_dir")


def write_run_facts(run_dir: Path, config_yaml: str, facts: Mapping[str, Any], *, start_step: int = 0) -> None:
    """Write config.yaml and run.json, which keeps a list of earlier starts.

    At step 0, metrics of an earlier start (which ended before its first checkpoint) are renamed.
    Raises UserError when the directory cannot be written.
    """
    path = run_dir / FACTS_NAME
    try:
        metrics = run_dir / METRICS_NAME
        if metrics.exists() and not start_step:
            stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(metrics.stat().st_mtime))
            metrics.rename(run_dir / f"metrics-{stamp}.jsonl")
        program = {**_program(), "start_step": start_step}
        write_text(run_dir / CONFIG_NAME, config_yaml)
        text = json.dumps({**program, **redact(dict(facts)), "earlier_starts": _starts(path, program)}, indent=2)
        write_text(path, text + "\n")
    except OSError as error:
        raise _cannot_write(run_dir, error) from error


def tracked_facts(run_dir: Path) -> dict[str, Any]:
    """What trackers record of run.json: versions, commit, and the fingerprints of the data."""
    facts = json.loads((run_dir / FACTS_NAME).read_text(encoding="utf-8"))
    data = facts["data"]
    sides = {"train": data["train"], "val": data["val"], **data["eval_sets"]}
    fingerprints = {name: side["fingerprint"] for name, side in sides.items() if side is not None}
    kept = {name: facts[name] for name in ("python", "versions", "commit")}
    return {**kept, "data_fingerprints": {**fingerprints, "plan": data["plan_fingerprint"]}}


def earlier_template_date(run_dir: Path, resume_mode: str) -> str | None:
    """`data.template_date` of the run that is resumed, or None."""
    folders = [run_dir, Path(resume_mode).expanduser().parent] if "://" not in resume_mode else [run_dir]
    for folder in folders:
        try:
            date = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))["data"]["template_date"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        if date is not None:
            return str(date)
    return None


def _starts(path: Path, program: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Starts recorded in run.json, oldest first."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return [*before.get("earlier_starts", []), {key: before[key] for key in program if key in before}]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _program() -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact(sys.argv),
        "python": platform.python_version(),
        "versions": package_versions(*_PACKAGES),
        "commit": _commit(),
    }


def package_versions(*names: str) -> dict[str, str]:
    """The installed version of each package."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _commit() -> str | None:
    """Commit of the source tree, with `-dirty` if it has changes; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.jsonl: metric -> (step, value) pairs, without non-finite values."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                series.setdefault(name, []).append((row["step"], value))
    return series


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The last value of each metric in metrics.jsonl."""
    return {name: points[-1][1] for name, points in read_metrics(run_dir / METRICS_NAME).items()}


def draw_curves(run_dir: Path) -> Path | None:
    """Plot loss and accuracy over steps to curves.png; None if matplotlib is not installed (extra `plot`)."""
    try:
        from matplotlib.figure import Figure  # pyplot would look for a display
    except ImportError:
        log.info("no curves.png: matplotlib is not installed (pip install 'rm-gallery[plot]')")
        return None
    series = read_metrics(run_dir / METRICS_NAME)
    figure = Figure(figsize=(10, 3.8))
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.085, right=0.98, bottom=0.13, top=0.9, wspace=0.22)
    of_tokens = "train/token_accuracy" in series
    accuracy = ("token_accuracy", "token accuracy") if of_tokens else ("accuracy", "pairwise accuracy")
    loss = ("loss", "loss per token" if of_tokens else "loss")
    for axis, (name, label) in zip(axes, (loss, accuracy), strict=True):
        train, val = series.get(f"train/{name}", []), series.get(f"val/{name}", [])
        if train:
            axis.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
            axis.plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="train (smoothed)")
        if val:
            axis.plot(*zip(*val, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if train or val:
            axis.legend(frameon=False)
    if not of_tokens:
        axes[1].axhline(0.5, color="gray", linestyle=":", linewidth=1)
    figure.suptitle(run_dir.name)
    path = run_dir / CURVES_NAME
    figure.savefig(path, dpi=120)
    return path


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Moving average over a fifteenth of the curve."""
    reach = max(1, len(points) // 30)
    smoothed = []
    for index, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, index - reach) : index + reach + 1]]
        smoothed.append((step, sum(near) / len(near)))
    return smoothed
