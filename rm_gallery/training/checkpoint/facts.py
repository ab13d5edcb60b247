"""state.json and rank_N.json of a `training_state`: what they hold, and reading them with every value checked.

A checkpoint may be damaged, edited, or written by someone else; its hashes are then of no help, since the same hand can
write them. So every value is checked before it is used, and the first fault is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rm_gallery.errors import UserError, one_line
from rm_gallery.training.checkpoint.state import (
    Progress,
    RandomState,
    preserve_random_state,
    set_random_state,
)
from rm_gallery.training.metric_names import parse_metric

STATE_NAME = "training_state"
FACTS_NAME = "state.json"

T = TypeVar("T")


@dataclass(frozen=True)
class SavedRun:
    """state.json: the run that a checkpoint belongs to, and how far it is."""

    progress: Progress
    fixed: dict[str, Any]
    """See `RunIdentity`."""
    config: dict[str, Any]
    total_steps: int
    world_size: int
    origin: str | None = None
    """The checkpoint that `trainer.resume_mode` named at the first start, if any."""


@dataclass(frozen=True)
class SavedRank:
    """rank_N.json."""

    random: RandomState
    sums: dict[str, float] = field(default_factory=dict)
    """Metric sums of the rank since the last log line."""


def rank_name(rank: int) -> str:
    """File name of a rank's RNG states and metric sums."""
    return f"rank_{rank}.json"


def read_run(folder: Path, names: Collection[str]) -> SavedRun:
    """Read state.json of a checkpoint.

    names: the files of its `training_state` that the manifest lists. Raises UserError that names the fault.
    """
    saved = _read(SavedRun, folder, FACTS_NAME, names)
    fault = _fault(saved, names)
    if fault is None and folder.name.startswith("global_step_") and folder.name != f"global_step_{saved.progress.step}":
        fault = f"progress.step is {saved.progress.step}, unlike the folder's name: rename the folder"
    if fault is not None:
        raise _unusable(folder, FACTS_NAME, fault)
    return saved


def _fault(saved: SavedRun, names: Collection[str]) -> str | None:
    """The first value that no run has."""
    progress = saved.progress
    if not 0 <= progress.bad_in_a_row <= progress.bad_steps <= progress.step <= saved.total_steps:
        return (
            f"progress.bad_in_a_row={progress.bad_in_a_row}, progress.bad_steps={progress.bad_steps}, "
            f"progress.step={progress.step} and total_steps={saved.total_steps} must be in ascending order from 0"
        )
    if (progress.best_step is None) != (progress.best_accuracy is None):
        return "only one of progress.best_step and progress.best_accuracy is set"
    if progress.best_step is not None and not 1 <= progress.best_step <= progress.step:
        return f"progress.best_step={progress.best_step} is no step of the run"
    metric = parse_metric(progress.best_metric)
    if metric is None or not metric.direction:
        return f"progress.best_metric={_short(progress.best_metric)} is no metric to compare checkpoints by"
    if progress.last_val_step is not None and not 0 <= progress.last_val_step <= progress.step:
        return f"progress.last_val_step={progress.last_val_step} is no step of the run"
    if not 0 <= progress.validations_since_highest <= progress.step + 1:
        return f"progress.validations_since_highest={progress.validations_since_highest} is no number of validations"
    ranks = {name for name in names if re.fullmatch(r"rank_\d+\.json", name)}
    if saved.world_size != len(ranks) or not ranks:
        return f"world_size={saved.world_size}, but the manifest lists {len(ranks)} files rank_N.json"
    return None


def read_ranks(folder: Path, world_size: int, names: Collection[str]) -> list[SavedRank]:
    """Read rank_N.json of every rank, and try its RNG states. Raises UserError that names the fault."""
    ranks = []
    for name in map(rank_name, range(world_size)):
        saved = _read(SavedRank, folder, name, names)
        try:
            with preserve_random_state():
                set_random_state(saved.random)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError) as error:
            reason = f"random is not the state of the generators ({type(error).__name__}: {one_line(error, 100)})"
            raise _unusable(folder, name, reason) from error
        ranks.append(saved)
    return ranks


def _read(kind: type[T], folder: Path, name: str, names: Collection[str]) -> T:
    from pydantic import TypeAdapter, ValidationError

    if name not in names:
        raise _unusable(folder, name, "the manifest does not list it")
    try:
        text = (folder / STATE_NAME / name).read_bytes()
        return TypeAdapter(kind).validate_json(text, strict=True)
    except OSError as error:
        raise _unusable(folder, name, error.strerror or str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        found = "" if first["type"] in ("missing", "json_invalid") else f", not {_short(first['input'])}"
        raise _unusable(folder, name, one_line(f"{key or 'content'}: {first['msg']}{found}", 200)) from error


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _unusable(folder: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{folder}: {STATE_NAME}/{name} cannot be used ({reason}); this checkpoint cannot be resumed: move it away, or "
        "set trainer.resume_mode to another one"
    )


def read_unchecked(folder: Path) -> dict[str, Any]:
    """state.json as it is written, to choose between checkpoints; {} when it cannot be read."""
    try:
        facts = json.loads((folder / STATE_NAME / FACTS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
