"""Checkpoint folders on disk: which are complete, whether one is whole, which are kept, and which one is the best.

global_step_N/                the Hugging Face folder of the model
global_step_N/training_state/ what training goes on from; complete.json in it is written last
.global_step_N.*              being written, fetched or deleted; nothing but cleaning looks at these
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.files import find_damage, remove, replace, write_text
from rm_gallery.training.checkpoint.state import BEST_METRIC, Progress

log = logging.getLogger(__name__)

STATE_NAME = "training_state"
FACTS_NAME = "state.json"
MARKER_NAME = "complete.json"
FORMAT = 1  # of training_state


def step_of(folder: Path) -> int:
    """N of `global_step_N`."""
    return int(folder.name.rpartition("_")[2])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("global_step_*") if re.fullmatch(r"global_step_\d+", path.name)]
    return sorted(found, key=step_of)


def is_resumable(folder: Path) -> bool:
    """Whether training can go on from it, as far as a look at the names tells."""
    return (folder / STATE_NAME / MARKER_NAME).is_file()


def refuse_earlier_run(run_dir: Path, *, anyway: bool = False) -> None:
    """Raise UserError when the folder holds an earlier run that cannot be continued; two runs must not mix.

    anyway: even if it can.
    """
    earlier = list_checkpoints(run_dir)
    if earlier and (anyway or not any(is_resumable(folder) for folder in earlier)):
        why = "trainer.resume_mode=disable" if anyway else "none of its checkpoints holds a training_state"
        raise UserError(
            f"{run_dir}: holds an earlier run (newest checkpoint {earlier[-1].name}), which cannot be continued "
            f"({why}); set another trainer.experiment_name or trainer.default_local_dir, or move the folder away"
        )


def hidden(folder: Path, purpose: str) -> Path:
    """Where a checkpoint is while it is being written (`saving`), fetched or deleted."""
    return folder.with_name(f".{folder.name}.{purpose}")


def clean(run_dir: Path) -> None:
    """Remove what saves and deletions that were cut short have left."""
    leftovers = sorted(run_dir.glob(".global_step_*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    if leftovers:
        log.info("removed what a save that was cut short has left: %s", ", ".join(path.name for path in leftovers))


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint that must not be used, as `global_step_N.damaged`; one of that name from before goes."""
    target = folder.with_name(f"{folder.name}.{why}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)
    return target


def publish(staging: Path, folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the marker, and give the staged folder its name; all of it is on the disk then.

    Raises OSError; the folder is not there then.
    """
    marker = staging / STATE_NAME / MARKER_NAME
    text = json.dumps({"format": FORMAT, "sha256": dict(sorted(hashes.items()))}, indent=2)
    marker.write_text(text + "\n", encoding="utf-8")
    replace(staging, folder)


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None when every file has its recorded hash.

    part, parts: look at every `parts`-th file only, from `part` on; ranks share the reading.
    """
    marker = folder / STATE_NAME / MARKER_NAME
    try:
        recorded = json.loads(marker.read_text(encoding="utf-8"))
        hashes, version = recorded["sha256"], recorded["format"]
        names = sorted(hashes)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"{MARKER_NAME} cannot be read"
    if version != FORMAT:
        return f"written in format {version!r}, which this version does not read"
    return find_damage(folder, {name: hashes[name] for name in names[part::parts]})


def read_facts(folder: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    facts: dict[str, Any] = json.loads((folder / STATE_NAME / FACTS_NAME).read_text(encoding="utf-8"))
    return facts


BEST_NAME = "best.json"


def keep_newest(run_dir: Path, number: int | None, best_step: int | None) -> None:
    """Delete all but the newest so many checkpoints; the best one is kept beside them. None keeps all.

    What cannot be deleted stays, with a warning.
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


def name_best(run_dir: Path, progress: Progress) -> None:
    """Write best.json: the checkpoint with the highest `val/accuracy` of the run."""
    path = run_dir / BEST_NAME
    if progress.best_step is None:
        path.unlink(missing_ok=True)
        return
    text = json.dumps(
        {
            "checkpoint": f"global_step_{progress.best_step}",
            "step": progress.best_step,
            BEST_METRIC: progress.best_accuracy,
        }
    )
    write_text(path, text + "\n")
