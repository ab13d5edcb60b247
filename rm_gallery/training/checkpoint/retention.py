"""Which checkpoints of a run are kept, and which one is the best."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from rm_gallery.training.checkpoint.folders import delete, list_checkpoints, step_of
from rm_gallery.training.checkpoint.progress import BEST_METRIC, Progress

log = logging.getLogger(__name__)

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
            delete(folder)
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
