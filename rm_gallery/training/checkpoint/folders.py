"""Checkpoint folders of a run: list, verify, commit, prune, and name the best one.

global_step_N/                 the Hugging Face model
global_step_N/training_state/  the training state: weights and optimizer, step, random states
global_step_N/manifest.json    SHA-256 of every file, written last: a checkpoint with a manifest is complete
.global_step_N.*               being written, downloaded or deleted; removed at the next start
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rm_gallery.errors import UserError
from rm_gallery.files import MANIFEST, check_manifest, manifest_names, remove, replace, write_manifest, write_text
from rm_gallery.training.checkpoint.facts import STATE_NAME, read_unchecked
from rm_gallery.training.checkpoint.state import LOSS_METRIC, Progress

log = logging.getLogger(__name__)

EARLIER_MANIFEST = f"{STATE_NAME}/complete.json"  # of earlier versions, whose manifest.json lists the model only
BEST_NAME = "best.json"


def step_of(folder: Path) -> int:
    """N of `global_step_N`."""
    return int(folder.name.rpartition("_")[2])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("global_step_*") if re.fullmatch(r"global_step_\d+", path.name)]
    return sorted(found, key=step_of)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that have a model and a manifest, oldest first; their contents are not checked."""
    found = list_checkpoints(run_dir)
    return [path for path in found if (path / manifest_of(path)).is_file() and (path / "config.json").is_file()]


def manifest_of(folder: Path) -> str:
    """Name of the file that lists all files of a checkpoint, relative to its folder."""
    return EARLIER_MANIFEST if (folder / EARLIER_MANIFEST).is_file() else MANIFEST


def is_resumable(folder: Path) -> bool:
    """Whether the folder has a manifest and a training state; their contents are not checked."""
    return (folder / manifest_of(folder)).is_file() and (folder / STATE_NAME).is_dir()


def refuse_earlier_run(run_dir: Path, *, anyway: bool = False) -> None:
    """Raise UserError if the folder holds a run that cannot be resumed, since two runs must not share a folder.

    anyway: also if it could be resumed.
    """
    earlier = list_checkpoints(run_dir)
    if earlier and (anyway or not any(is_resumable(folder) for folder in earlier)):
        why = "trainer.resume_mode=disable" if anyway else "none of its checkpoints holds a training_state"
        raise UserError(
            f"{run_dir}: holds an earlier run (newest checkpoint {earlier[-1].name}), which cannot be resumed "
            f"({why}); set another trainer.experiment_name or trainer.default_local_dir, or move the folder away"
        )


def hidden(folder: Path, purpose: str) -> Path:
    """Path of a checkpoint that is being saved or downloaded (`saving`, `downloading`)."""
    return folder.with_name(f".{folder.name}.{purpose}")


def clean(run_dir: Path) -> None:
    """Remove partial checkpoints of interrupted saves, downloads and deletions."""
    partial = sorted(run_dir.glob(".global_step_*"))
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    if partial:
        log.info("removed partial checkpoints: %s", ", ".join(path.name for path in partial))


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint that must not be used to `global_step_N.WHY`, replacing an earlier one of that name."""
    target = folder.with_name(f"{folder.name}.{why}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)
    return target


def publish(staging: Path, folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the manifest, flush everything to disk, and rename the staging folder to its final name.

    Raises OSError; `folder` does not exist then.
    """
    write_manifest(staging, hashes)
    replace(staging, folder)


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Describe the first damaged file, or return None if every file matches the manifest. See `check_manifest`."""
    return check_manifest(folder, manifest=manifest_of(folder), part=part, parts=parts)


def files_of(folder: Path) -> list[str]:
    """Names of all files of an intact checkpoint, relative to its folder, its manifests last. No other file is used."""
    manifests = [name for name in (MANIFEST, EARLIER_MANIFEST) if (folder / name).is_file()]
    listed = manifest_names((folder / manifest_of(folder)).read_bytes())
    return [*(name for name in listed if name not in manifests), *manifests]


def state_files(folder: Path) -> set[str]:
    """Names of the files of its `training_state`, relative to that folder."""
    return {name.removeprefix(f"{STATE_NAME}/") for name in files_of(folder) if name.startswith(f"{STATE_NAME}/")}


def keep_newest(run_dir: Path, number: int | None, best_step: int | None) -> None:
    """Delete all but the newest `number` checkpoints and the best one. None keeps all.

    A checkpoint that cannot be deleted is kept, with a warning.
    """
    if number is None:
        return
    for folder in list_checkpoints(run_dir)[:-number]:
        if step_of(folder) == best_step:
            continue
        try:
            remove(folder)
        except OSError as error:
            log.warning("%s: cannot be deleted (%s), though trainer.max_ckpt_to_keep=%d", folder, error, number)
        else:
            log.info("deleted %s (trainer.max_ckpt_to_keep=%d)", folder, number)


MAX_LOSS_GROWTH = 10  # a loss above this many times the lowest loss, or that of chance (ln 2), counts as diverged


def last_good(folders: Sequence[Path], before: int) -> Path | None:
    """The newest checkpoint from before a divergence, by the losses in its state.json; None if there is none.

    before: the last step that was not skipped, whose update the later steps failed on. A checkpoint from that step on
    is chosen only if there is no earlier one.
    """
    losses = {folder: _losses(folder) for folder in folders}
    finite = [each for found in losses.values() for each in found if math.isfinite(each)]
    limit = MAX_LOSS_GROWTH * max(min(finite, default=0.0), math.log(2))
    good = [folder for folder, found in losses.items() if all(each <= limit for each in found)]  # NaN is not
    earlier = [folder for folder in good if step_of(folder) < before]
    return max(earlier or good, key=step_of, default=None)


def _losses(folder: Path) -> list[float]:
    """The last training and validation loss before a checkpoint, as far as it has them."""
    progress = read_unchecked(folder).get("progress")
    validation = progress.get("last_val") if isinstance(progress, dict) else None
    found = [progress.get("last_loss")] if isinstance(progress, dict) else []
    found += [validation.get(LOSS_METRIC)] if isinstance(validation, dict) else []
    return [each for each in found if isinstance(each, int | float)]


def name_best(run_dir: Path, progress: Progress) -> None:
    """Write best.json: the checkpoint with the best value of `trainer.save_best_metric` of the run."""
    path = run_dir / BEST_NAME
    step = progress.best_step
    if step is None:
        path.unlink(missing_ok=True)
        return
    best = {"checkpoint": f"global_step_{step}", "step": step, progress.best_metric: progress.best_accuracy}
    write_text(path, json.dumps(best) + "\n")


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that best.json names; None without that file, or with a warning if the checkpoint is not there."""
    path = run_dir / BEST_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    found = next((each for each in complete_checkpoints(run_dir) if each.name == name), None)
    if found is None:
        log.warning("%s: names no complete checkpoint of the run; it is ignored", path)
    return found
