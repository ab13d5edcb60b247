"""Trackers that need an extra package: TensorBoard, wandb, swanlab, mlflow, trackio.

Packages are imported when their tracker starts. None may prompt: a run that waits for an API key looks like a hang.
The run id of a service is saved in tracker_ids.json, so that a resumed run continues it.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_gallery.errors import one_line
from rm_gallery.files import write_text
from rm_gallery.safe_text import redact
from rm_gallery.training.trackers.base import IDS_NAME, RunInfo, flat

log = logging.getLogger(__name__)


class TensorboardTracker:
    """Event files in `tensorboard/` of the run directory; the configuration is the text "config".

    It has no files, so only a report in JSON is stored, as the text "report".
    """

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # On resume, hide the steps that the interrupted run logged after the checkpoint.
        purge_step = run.start_step + 1 if run.start_step else None
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge_step, flush_secs=30)
        text = json.dumps(plain_config(run), indent=2, ensure_ascii=False)
        self._writer.add_text("config", f"```json\n{text}\n```", run.start_step)
        self._step = run.start_step

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def attach(self, file: Path) -> None:
        if file.suffix == ".json":
            self._writer.add_text("report", f"```json\n{file.read_text(encoding='utf-8')}\n```", self._step)

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

    def attach(self, file: Path) -> None:
        path = str(file)
        literal = {} if glob.escape(path) == path else {"glob": False}  # which versions before July 2026 do not have
        self._run.save(path, base_path=str(file.parent), policy="now", **literal)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class SwanlabTracker:
    """A swanlab run with files in `swanlog/` of the run directory, configured by SWANLAB_MODE and `swanlab login`.

    After the start swanlab prints errors instead of raising them. Offline, each start has a folder of its own with the
    same run id, and `swanlab sync` of all of them gives one run.
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
        save_id("swanlab", self._run.id, run.run_dir)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, file: Path) -> None:
        if not self._run.save(str(file), base_path=str(file.parent), policy="now"):
            raise OSError(f"{file} is no glob pattern of itself; rename its folder")

    def close(self, *, failed: bool = False) -> None:
        with preserve_hooks():
            self._run.finish(state="crashed", error="training failed") if failed else self._run.finish()


class MlflowTracker:
    """An mlflow run: in `mlflow.db` of the run directory, or where MLFLOW_TRACKING_URI says.

    The configuration is stored as parameters, which cannot change, and as config.json, which is that of the last start.
    Metrics that a resumed run logged before are not logged again, since mlflow would keep both values.
    """

    def __init__(self, run: RunInfo) -> None:
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            folder = run.run_dir.resolve()
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow-artifacts").as_uri()
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a local run uses no network
        # By default a request to a server that does not answer blocks training for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        if artifacts is not None:
            import sqlalchemy  # noqa: F401  # the local store needs it, and mlflow-skinny does not install it

        run.run_dir.mkdir(parents=True, exist_ok=True)
        run_id = saved_id("mlflow", run)
        with quiet("mlflow", "alembic"), no_prompts():
            self._client = MlflowClient(tracking_uri=uri)
            self._is_resumed = run_id is not None and self._reopen(run_id)
            if not self._is_resumed:
                found = self._client.get_experiment_by_name(run.project_name)
                experiment = found.experiment_id if found else self._client.create_experiment(
                    run.project_name, artifact_location=artifacts
                )  # fmt: skip
                run_id = self._client.create_run(experiment, run_name=run.experiment_name).info.run_id
            self._id, self._last_steps = str(run_id), dict[str, int]()
            known = self._client.get_run(self._id).data.params
            values = {allowed_name(name): str(value)[:_MAX_PARAM] for name, value in flat(plain_config(run)).items()}
            params = [Param(name, value) for name, value in values.items() if name not in known]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])
            self._client.log_dict(self._id, plain_config(run), "config.json")
        save_id("mlflow", self._id, run.run_dir)
        if artifacts is None:
            log.info("mlflow: run %s at %s", self._id, redact(uri))

    def _reopen(self, run_id: str) -> bool:
        """Continue a run; False if the store does not have it, as another one than that of the first start."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            log.warning("mlflow: run %s cannot be continued (%s): a new one is started", run_id, one_line(error))
            return False
        return True

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(allowed_name(name), float(value), now, step)
            for name, value in metrics.items()
            if step > self._last_step(allowed_name(name))
        ]
        for start in range(0, len(new), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=new[start : start + _MAX_METRICS])

    def _last_step(self, name: str) -> int:
        """The last step of a metric before this start."""
        if not self._is_resumed:
            return -1
        if name not in self._last_steps:
            history = self._client.get_metric_history(self._id, name)
            self._last_steps[name] = max((each.step for each in history), default=-1)
        return self._last_steps[name]

    def attach(self, file: Path) -> None:
        self._client.log_artifact(self._id, str(file))

    def close(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class TrackioTracker:
    """A trackio run: on this machine (TRACKIO_DIR), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say.

    After the start trackio warns about errors instead of raising them. A resumed run has the repeated steps twice.
    """

    def __init__(self, run: RunInfo) -> None:
        import trackio

        run_id = saved_id("trackio", run)

        def start(resume: str) -> Any:
            return trackio.init(
                project=run.project_name, name=run.experiment_name, config=plain_config(run), resume=resume, embed=False
            )

        with contextlib.redirect_stdout(io.StringIO()), no_prompts():
            self._run = start("allow" if run_id else "never")
            if run_id and self._run.id != run_id:  # it looks a run up by its name: the newest one
                log.warning(
                    "trackio: project %s has no run %s, or a newer one of the name %s: a new run is started",
                    run.project_name, run_id, run.experiment_name,
                )  # fmt: skip
                trackio.finish()
                self._run = start("never")
        save_id("trackio", self._run.id, run.run_dir)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, file: Path) -> None:
        name = f"run-{self._run.id}-{file.name}"  # artifacts belong to a project
        self._run.log_artifact(str(file), name=name, type="report", overwrite=True)

    def close(self, *, failed: bool = False) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # of this run; `self._run.finish` would be repeated when the process ends


_MAX_PARAM, _MAX_PARAMS, _MAX_METRICS = 6000, 100, 1000  # characters of a parameter, items of a batch


def allowed_name(name: str) -> str:
    """A name without the characters that mlflow refuses."""
    return re.sub(r"[^\w./: -]", "_", name)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hide the messages of these loggers below warnings."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


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
