"""Trackers that need an extra package: TensorBoard, wandb, swanlab.

Packages are imported when their tracker starts. None may prompt: a run that waits for an API key looks like a hang.
The run id of a service is saved in tracker_ids.json, so that a resumed run continues it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_gallery.files import write_text
from rm_gallery.safe_text import redact
from rm_gallery.training.trackers.base import IDS_NAME, RunInfo

log = logging.getLogger(__name__)


class TensorboardTracker:
    """Event files in `tensorboard/` of the run directory; the configuration is the text "config"."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # On resume, hide the steps that the interrupted run logged after the checkpoint.
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
    """A wandb run, configured by WANDB_MODE, WANDB_API_KEY and `wandb login`.

    wandb ignores decreasing steps: after a resume, steps that it has already.
    """

    def __init__(self, run: RunInfo) -> None:
        import wandb

        run_id = saved_id("wandb", run)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        remote = git_remote()
        with no_prompts(), redacted_arguments():
            self._run = wandb.init(
                project=run.project_name,
                name=run.experiment_name,
                dir=str(run.run_dir),
                config=plain_config(run),
                id=run_id,
                resume="allow" if run_id else None,
                # console="off": wandb must not wrap the streams that the progress bar draws on.
                # It would save the address of the git remote as well; the user in it may be a token.
                settings=wandb.Settings(
                    silent=True, console="off", git_remote_url=redact(remote) if redact(remote) != remote else None
                ),
            )
        save_id("wandb", self._run.id, run.run_dir)
        if not self._run.offline and self._run.url:
            log.info("wandb: %s", self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class SwanlabTracker:
    """A swanlab run with files in `swanlog/` of the run directory, configured by SWANLAB_MODE and `swanlab login`.

    After the start swanlab prints errors instead of raising them.
    """

    def __init__(self, run: RunInfo) -> None:
        import swanlab

        run_id = saved_id("swanlab", run)
        settings, hidden = swanlab.Settings, without_secrets()
        with no_prompts(), preserve_hooks():
            self._run = swanlab.init(
                project=run.project_name,
                name=run.experiment_name,
                log_dir=str(run.run_dir / "swanlog"),
                config=plain_config(run),
                id=run_id,
                resume="allow" if run_id else None,
                # proxy_type="none": swanlab must not wrap the streams that the progress bar draws on.
                # It saves the command line and the address of the git remote: not if a credential is in them.
                settings=settings(
                    terminal=settings.Terminal(proxy_type="none"), **({"probe": hidden} if hidden else {})
                ),
            )
        if self._run.mode == "online":  # other modes cannot resume a run
            save_id("swanlab", self._run.id, run.run_dir)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool = False) -> None:
        with preserve_hooks():
            self._run.finish(state="crashed", error="training failed") if failed else self._run.finish()


@contextlib.contextmanager
def no_prompts() -> Iterator[None]:
    """Replace standard input by a non-terminal, so that a package without a login raises instead of prompting."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


@contextlib.contextmanager
def redacted_arguments() -> Iterator[None]:
    """Redact the command line, which a package saves when it starts."""
    arguments = sys.argv
    sys.argv = redact(arguments)
    try:
        yield
    finally:
        sys.argv = arguments


def without_secrets() -> dict[str, bool]:
    """What swanlab must not record: it reads the command line and the git remote itself."""
    command, remote = [*sys.orig_argv, *sys.argv], git_remote()
    return {name: False for name, text in (("runtime", command), ("git", remote)) if redact(text) != text}


def git_remote() -> str:
    """Address of the remote of the working directory, which may hold a password or a token; "" if there is none."""
    try:
        asked = ["git", "config", "--get", "remote.origin.url"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


@contextlib.contextmanager
def preserve_hooks() -> Iterator[None]:
    """Restore the handlers of Ctrl-C and uncaught exceptions after the block.

    swanlab sets its own at the start and restores what it found at the end. Either would replace the trainer's handler,
    which saves a checkpoint first. `close(failed=True)` reports a failure instead.
    """
    excepthook, on_interrupt = sys.excepthook, signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        sys.excepthook = excepthook
        if threading.current_thread() is threading.main_thread() and on_interrupt is not None:
            signal.signal(signal.SIGINT, on_interrupt)


def plain_config(run: RunInfo) -> dict[str, Any]:
    """The configuration and the facts of the run as JSON values without secrets; other types (paths) become strings."""
    values = {**run.config, **({"run": run.facts} if run.facts else {})}
    plain: dict[str, Any] = redact(json.loads(json.dumps(values, default=str)))
    return plain


def saved_id(name: str, run: RunInfo) -> str | None:
    """The service's id of the resumed run; None for a new run, or if none was saved."""
    found = _saved_ids(run.run_dir).get(name) if run.start_step else None
    return found if isinstance(found, str) else None


def save_id(name: str, run_id: str, run_dir: Path) -> None:
    """Save a service's run id in tracker_ids.json."""
    write_text(run_dir / IDS_NAME, json.dumps({**_saved_ids(run_dir), name: run_id}, indent=2) + "\n")


def _saved_ids(run_dir: Path) -> dict[str, Any]:
    path = run_dir / IDS_NAME
    if not path.exists():
        return {}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(ids, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s): services start new runs", path, error)
        return {}
    return ids
