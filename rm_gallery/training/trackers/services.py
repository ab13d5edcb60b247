"""The trackers that need a package of their own: TensorBoard, wandb, swanlab.

Each package is imported when its tracker starts. None may ask questions: a run that waits for a key it will never get
looks like a hang. The service's run id is kept in tracker_ids.json, so that a resumed run continues the same one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_gallery.files import write_text
from rm_gallery.training.trackers.base import IDS_NAME, RunInfo

log = logging.getLogger(__name__)


class TensorboardTracker:
    """Event files in `<run folder>/tensorboard`; the configuration is the text "config"."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # On resume, hide the steps after the checkpoint that the interrupted run had written.
        purge_step = run.start_step + 1 if run.start_step else None
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge_step, flush_secs=30)
        if not run.start_step:
            text = json.dumps(plain_config(run), indent=2, ensure_ascii=False)
            self._writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class WandbTracker:
    """A wandb run; WANDB_MODE, WANDB_API_KEY and `wandb login` decide where it goes.

    wandb takes only steps that do not decrease: after a resume it ignores the steps it has already.
    """

    def __init__(self, run: RunInfo) -> None:
        import wandb

        run_id = saved_id("wandb", run)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        with no_questions():
            self._run = wandb.init(
                project=run.project_name,
                name=run.experiment_name,
                dir=str(run.run_dir),
                config=plain_config(run),
                id=run_id,
                resume="allow" if run_id else None,
                # console="off": wandb must not wrap the streams that the progress bar draws on.
                settings=wandb.Settings(silent=True, console="off"),
            )
        save_id("wandb", self._run.id, run.run_dir)
        if not self._run.offline and self._run.url:
            log.info("wandb: %s", self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class SwanlabTracker:
    """A swanlab run with its files in `<run folder>/swanlog`; SWANLAB_MODE and `swanlab login` decide where it goes.

    swanlab does not raise for trouble after the start: it prints and goes on by itself.
    """

    def __init__(self, run: RunInfo) -> None:
        import swanlab

        run_id = saved_id("swanlab", run)
        with no_questions(), own_hooks():
            self._run = swanlab.init(
                project=run.project_name,
                name=run.experiment_name,
                log_dir=str(run.run_dir / "swanlog"),
                config=plain_config(run),
                id=run_id,
                resume="allow" if run_id else None,
                # proxy_type="none": swanlab must not wrap the streams that the progress bar draws on.
                settings=swanlab.Settings(terminal=swanlab.Settings.Terminal(proxy_type="none")),
            )
        if self._run.mode == "online":  # the other modes cannot continue a run
            save_id("swanlab", self._run.id, run.run_dir)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool = False) -> None:
        with own_hooks():
            self._run.finish(state="crashed", error="training failed") if failed else self._run.finish()


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """Let standard input look like no terminal, so that a package without a login raises instead of asking for one."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


@contextlib.contextmanager
def own_hooks() -> Iterator[None]:
    """Put our handlers for Ctrl-C and uncaught exceptions back after the block.

    swanlab sets its own when it starts and restores, when it ends, what it found then; either would replace the
    trainer's handler that saves a checkpoint first. `close(failed=True)` reports the failure instead.
    """
    excepthook, on_interrupt = sys.excepthook, signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        sys.excepthook = excepthook
        if threading.current_thread() is threading.main_thread() and on_interrupt is not None:
            signal.signal(signal.SIGINT, on_interrupt)


def plain_config(run: RunInfo) -> dict[str, Any]:
    """The configuration as what JSON can hold; anything else (a path) as text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(run.config), default=str))
    return plain


def saved_id(name: str, run: RunInfo) -> str | None:
    """The service's id of the run that is being resumed; None for a new run or when none was kept."""
    path = run.run_dir / IDS_NAME
    if not run.start_step or not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get(name)
    return found if isinstance(found, str) else None


def save_id(name: str, run_id: str, run_dir: Path) -> None:
    """Keep a service's run id beside the others."""
    path = run_dir / IDS_NAME
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps({**ids, name: run_id}, indent=2) + "\n")
