"""Resuming: choose a checkpoint, check that it belongs to this run, and load it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm_gallery.distributed.collectives import HostGroup
from rm_gallery.errors import UserError
from rm_gallery.safe_text import redact_urls
from rm_gallery.training.checkpoint.facts import STATE_NAME, SavedRun, read_ranks, read_run, read_unchecked
from rm_gallery.training.checkpoint.folders import (
    clean,
    damage,
    is_resumable,
    list_checkpoints,
    refuse_earlier_run,
    set_aside,
    state_files,
    step_of,
)
from rm_gallery.training.checkpoint.mirror import download, newest_upload
from rm_gallery.training.checkpoint.state import Progress, RandomState, RunTensors

log = logging.getLogger(__name__)


PLAN = "plan"  # key in `RunIdentity.fixed`; it follows from settings, which errors name instead


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a run: a checkpoint with other `fixed` values is rejected."""

    fixed: Mapping[str, Any]
    """Configuration key, or a description without dots -> plain value."""
    config: Mapping[str, Any]
    """The whole configuration, nested; a warning names other changes."""
    total_steps: int
    rate_at: Callable[[int, int], float]
    """(total steps, step from 0) -> factor of the learning rate."""

    def facts(self, origin: str | None) -> dict[str, Any]:
        """For state.json. origin: the checkpoint that `trainer.resume_mode` named at the first start, if any."""
        return {
            "fixed": dict(self.fixed), "config": dict(self.config), "total_steps": self.total_steps, "origin": origin,
        }  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where training starts: at step 0, or at the step of a checkpoint."""

    folder: Path | None = None
    progress: Progress = field(default_factory=Progress)
    random: RandomState | None = None
    """None at step 0, and if the world size has changed."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """Metric sums of this rank since the last log line."""
    origin: str | None = None
    """See `RunIdentity.facts`."""


def find_start(
    run_dir: Path, mode: str, identity: RunIdentity, tensors: RunTensors, ranks: HostGroup,
    *, mirror_url: str | None = None,
) -> Start:  # fmt: skip
    """Choose the checkpoint to resume from, verify it, and load it. A collective: every rank calls it.

    mode: `trainer.resume_mode`. mirror_url: where to look if the run directory has no checkpoint.
    Raises UserError for a checkpoint of another run.
    """
    found_damage = False
    while True:
        choice, problem = None, None
        if ranks.rank == 0:
            try:
                clean(run_dir)
                choice = _choose(run_dir, mode, mirror_url)
            except (UserError, OSError) as error:
                problem = str(error)
        ranks.raise_problem(problem)
        choice = ranks.broadcast(choice)
        if choice is None:
            if found_damage:
                log.warning("no intact checkpoint is left: training starts from scratch")
            return Start()
        folder = choice.folder
        problems = ranks.all_gather(damage(folder, part=ranks.rank, parts=ranks.world_size))
        damaged = next((each for each in problems if each), None)
        if damaged is None:
            start = _load(choice, identity, tensors, ranks, run_dir)
            for later in choice.superseded if ranks.rank == 0 else ():
                log.warning("%s: renamed to %s", later, set_aside(later, "superseded").name)
            return start
        if choice.named:
            raise UserError(f"{choice.named}: {damaged}; it is damaged; choose another checkpoint")
        found_damage = True
        if ranks.rank == 0:
            name = set_aside(folder, "damaged").name
            log.warning("%s is damaged (%s): renamed to %s, trying the previous checkpoint", folder, damaged, name)


@dataclass(frozen=True)
class _Choice:
    """A checkpoint to resume from, if it is intact."""

    folder: Path
    origin: str | None
    named: str = ""
    """The setting that names this checkpoint, so that no other may replace it; "" if none does."""
    superseded: Sequence[Path] = ()
    """Later checkpoints of the same run directory, which the resumed run replaces."""
    is_restart: bool = True
    """The same command again, rather than a run that `trainer.resume_mode` starts from a checkpoint."""


def _choose(run_dir: Path, mode: str, mirror_url: str | None) -> _Choice | None:
    """The checkpoint to try next; None to start from scratch."""
    refuse_earlier_run(run_dir, anyway=mode == "disable")
    if mode == "disable":
        return None
    own = [folder for folder in list_checkpoints(run_dir) if is_resumable(folder)]
    if mode == "auto":
        if not own and mirror_url is not None and (url := newest_upload(mirror_url)):
            return _Choice(download(url, run_dir), None, named=f"trainer.default_hdfs_dir={mirror_url}: {url}")
        return _Choice(own[-1], _origin(own[-1])) if own else None
    origin = redact_urls(mode) if "://" in mode else os.path.realpath(os.path.expanduser(mode))
    if own and _origin(own[-1]) == origin:
        return _Choice(own[-1], origin)  # a restart of a run that started from there
    named = f"trainer.resume_mode={mode}"
    if "://" not in mode:
        wanted = Path(origin)
        if not is_resumable(wanted):
            lacks = "no training_state in it" if wanted.is_dir() else "no such folder"
            raise UserError(f"{named}: {lacks}; give a global_step_N folder, or set auto or disable")
        if wanted.parent == Path(os.path.realpath(run_dir)):
            later = [folder for folder in own if step_of(folder) > step_of(wanted)]
            return _Choice(run_dir / wanted.name, origin, named, later, is_restart=False)
    if own:
        raise UserError(
            f"{run_dir}: holds a run (newest checkpoint {own[-1].name}) that did not start from {named}; "
            "set another trainer.experiment_name, or trainer.resume_mode=auto to resume that run"
        )
    return _Choice(download(mode, run_dir) if "://" in mode else wanted, origin, named, is_restart=False)


def _origin(folder: Path) -> str | None:
    origin = read_unchecked(folder).get("origin")
    return origin if isinstance(origin, str) else None


def _load(choice: _Choice, identity: RunIdentity, tensors: RunTensors, ranks: HostGroup, run_dir: Path) -> Start:
    folder = choice.folder
    names = state_files(folder)
    saved = read_run(folder, names)
    parts = read_ranks(folder, saved.world_size, names)
    progress = saved.progress
    changed = _check_identity(folder, saved, identity)
    _check_length(folder, saved, progress.step, identity)
    _check_changes(folder, changed, is_restart=choice.is_restart)
    tensors.load(folder / STATE_NAME, names, ranks)
    if progress.best_step is not None and not (run_dir / f"global_step_{progress.best_step}").is_dir():
        progress.best_step = progress.best_accuracy = None
    if saved.world_size == ranks.world_size:
        random, sums = parts[ranks.rank].random, parts[ranks.rank].sums
    else:
        log.warning(
            "resuming with %d processes, saved by %d: RNG states are not restored, and results agree up to rounding",
            ranks.world_size, saved.world_size,
        )  # fmt: skip
        # Rank 0 takes all sums; the others have zeros under the same names.
        random, sums = None, {name: 0.0 for part in parts for name in part.sums}
        for part in parts if ranks.rank == 0 else []:
            for name, value in part.sums.items():
                sums[name] += value
    log.info("resuming from step %d of %s", progress.step, folder)
    return Start(folder, progress, random, sums, choice.origin)


def _check_identity(folder: Path, saved: SavedRun, identity: RunIdentity) -> dict[str, str]:
    """The settings that have changed since the checkpoint, as `_changes`. Raises UserError for another run's."""
    was, now = saved.fixed, json.loads(json.dumps(dict(identity.fixed)))
    differing = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    changed = _changes(saved.config, json.loads(json.dumps(dict(identity.config), default=str)))
    if differing:
        # A difference may be in a hash; the settings that it was computed from are more useful.
        causes = [text for key, text in changed.items() if key.startswith("data.") and key != "data.val_files"]
        differences = [
            f"{name}{'=' if '.' in name else ': '}{_shown(now.get(name))}, was {_shown(was.get(name))}"
            for name in differing
            if name != PLAN or not (causes or differing[1:])
        ]
        raise UserError(
            f"{folder}: belongs to a different run: {'; '.join(differences + causes)}. To resume, restore these "
            "values; for a new run set another trainer.experiment_name, and model.partial_pretrain to that folder to "
            "start from its weights"
        )
    return changed


# Settings that leave the trained weights as they are, but for rounding. `RunIdentity.fixed` covers those of the data.
_EXECUTION = re.compile(
    r"data\.(?!val_)|model\.(trust_remote_code|enable_gradient_checkpointing|checkpointing_mode|attention|use_liger"
    r"|compile|strategy|packing|fsdp_config\.(?!model_dtype|master_weights))|trainer\.(?!export_dtype|total_)"
)


def _check_changes(folder: Path, changed: Mapping[str, str], *, is_restart: bool) -> None:
    """Raise UserError if the same run directory is used with another configuration; log other changes."""
    other = [text for key, text in changed.items() if not _EXECUTION.match(key)]
    if is_restart and other:
        raise UserError(
            f"{folder.parent}: holds a run with another configuration (newest checkpoint {folder.name}): "
            f"{'; '.join(other)}. For a new run set trainer.experiment_name=...; to continue that run with the new "
            f"values set trainer.resume_mode={folder}"
        )
    new = [text for key, text in changed.items() if key != "trainer.resume_mode"]
    if new:
        log.warning("resuming with changed settings: %s", "; ".join(new))


def _is_moved(key: str, old: Any, new: Any) -> bool:
    """The base model under another path with the same last part, e.g. on another machine; nothing is read from it."""
    is_path = key == "model.partial_pretrain" and isinstance(old, str) and isinstance(new, str)
    return is_path and os.path.basename(os.path.normpath(old)) == os.path.basename(os.path.normpath(new))


def _changes(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`key=value, was value` by key, for every value that differs. Keys that another version added are omitted."""
    found: dict[str, str] = {}
    for name in was:
        if name not in now:
            continue
        old, new = was[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.update(_changes(old, new, f"{prefix}{name}."))
        elif old != new and not _is_moved(prefix + name, old, new):
            found[prefix + name] = f"{prefix}{name}={_shown(new)}, was {_shown(old)}"
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_length(folder: Path, saved: SavedRun, step: int, identity: RunIdentity) -> None:
    """Raise UserError if a changed number of steps would make the learning rate jump."""
    was, now = saved.total_steps, identity.total_steps
    if was == now:
        return
    if now < step:
        raise UserError(
            f"{folder}: the run is at step {step}, past the {now} steps that are configured; raise "
            "trainer.total_epochs or trainer.total_training_steps"
        )
    before, after = identity.rate_at(was, step), identity.rate_at(now, step)
    if abs(before - after) > 1e-9:
        raise UserError(
            f"{folder}: belongs to a run of {was} steps, now {now} are configured, and with this schedule the learning "
            f"rate would jump from {before:.4g} to {after:.4g} of its peak. Only `constant`, and `wsd` before its "
            "decay, can change their length after the warm-up: restore trainer.total_epochs or total_training_steps, "
            "or start a new run with model.partial_pretrain set to that folder"
        )
    log.info("the run has %d steps now, %d before", now, was)
