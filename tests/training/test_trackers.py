"""Trackers as a whole: metrics.jsonl is always written; a failure is one sentence or one warning."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.training.trackers import TRACKERS, RunInfo, Tracker, TrackerConfig, Trackers
from rm_gallery.training.trackers.services import save_id, saved_id
from tests.training.tracker_runs import log_all, make_run


class Recorder:
    """A tracker that keeps what it is told, and raises in log() from step `fails_from` on."""

    def __init__(self, fails_from: float = math.inf) -> None:
        self.fails_from = fails_from
        self.steps: list[int] = []
        self.closed: list[bool] = []
        self.files: list[str] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append(step)
        if step >= self.fails_from:
            raise OSError("connection\nlost")

    def attach(self, file: Path) -> None:
        if self.fails_from < math.inf:
            raise OSError("quota\nexceeded")
        self.files.append(file.name)

    def close(self, *, failed: bool = False) -> None:
        self.closed.append(failed)


def test_metrics_file_holds_one_object_per_log_call_and_null_for_nan(tmp_path: Path) -> None:
    trackers = Trackers([], make_run(tmp_path))
    log_all(trackers)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # before close: each line was flushed
    trackers.close()
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"step": 1, "train/loss": 0.75, "train/accuracy": 0.5, "train/lr": 0.0001},
        {"step": 2, "train/loss": 0.5, "train/accuracy": 0.75, "train/lr": 0.0002},
        {"step": 2, "val/loss": 0.625, "val/accuracy": None},
    ]
    assert all(line["time"] > 1.6e9 for line in lines)


def test_metrics_file_is_appended_to_after_dropping_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2, "tra')
    trackers = Trackers([], make_run(tmp_path, start_step=1))
    trackers.log({"train/loss": math.inf}, 2)
    trackers.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["train/loss"] is None


def test_metrics_of_the_lost_part_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    kept = ['{"step": 0, "val/loss": 1.0}', '{"step": 1, "train/loss": 0.5}', '{"step": 2, "train/loss": null}']
    lost = ['{"step": 2, "val/loss": 0.7}', '{"step": 3, "train/loss": 0.4}', "no row", '{"step": 1, "train/lo']
    path.write_text("\n".join([*kept, *lost]))
    run = replace(make_run(tmp_path, start_step=2), repeats_validation=True)
    trackers = Trackers([], run)
    trackers.log({"val/loss": 0.7}, 2)
    trackers.close()
    lines = path.read_text().splitlines()
    assert lines[:3] == kept
    assert [(row["step"], row["val/loss"]) for row in map(json.loads, lines[3:])] == [(2, 0.7)]


def test_full_disk_warns_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    recorder = Recorder()
    monkeypatch.setitem(TRACKERS, "console", lambda run: recorder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    trackers = Trackers(["console"], make_run(tmp_path))
    with caplog.at_level(logging.WARNING, logger="rm_gallery.training.trackers"):
        log_all(trackers)
        trackers.close()
    assert recorder.steps == [1, 2, 2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("metrics.jsonl failed at step 1") and "No space left" in message


def test_tracker_that_raises_warns_once_and_is_not_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, healthy = Recorder(fails_from=2), Recorder()
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: broken)
    monkeypatch.setitem(TRACKERS, "swanlab", lambda run: healthy)
    trackers = Trackers(["wandb", "swanlab"], make_run(tmp_path))
    with caplog.at_level(logging.WARNING, logger="rm_gallery.training.trackers"):
        for step in (1, 2, 3, 4):
            trackers.log({"train/loss": 0.5}, step)
        trackers.close()
        trackers.close()
    assert broken.steps == [1, 2] and healthy.steps == [1, 2, 3, 4]
    assert broken.closed == [True] and healthy.closed == [False]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "wandb failed at step 2 and is disabled: connection lost"


def test_the_report_goes_to_every_tracker_and_one_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, healthy = Recorder(fails_from=99), Recorder()
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: full)
    monkeypatch.setitem(TRACKERS, "trackio", lambda run: healthy)
    trackers = Trackers(["console", "wandb", "trackio"], make_run(tmp_path))
    with caplog.at_level(logging.WARNING, logger="rm_gallery.training.trackers"):
        trackers.attach([tmp_path / "report.html", tmp_path / "report.json"])
        trackers.close()
    assert healthy.files == ["report.html", "report.json"]
    assert [record.getMessage() for record in caplog.records] == ["wandb did not store the report: quota exceeded"]
    assert full.closed == [False], "it is closed as any other"


def test_failed_start_closes_the_trackers_already_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Recorder()

    def refuse(run: RunInfo) -> Tracker:
        raise RuntimeError("server says\n no.")

    monkeypatch.setitem(TRACKERS, "tensorboard", lambda run: started)
    monkeypatch.setitem(TRACKERS, "swanlab", refuse)
    with pytest.raises(UserError) as error:
        Trackers(["tensorboard", "swanlab"], make_run(tmp_path))
    assert started.closed == [True]
    assert str(error.value) == (
        "trainer.logger: swanlab cannot start (server says no): run `swanlab login`, set SWANLAB_MODE=offline, "
        "or drop swanlab from trainer.logger"
    )


def test_unknown_tracker_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tracker 'wanb'; known are console, .*Did you mean 'wandb'\?"):
        Trackers(["wanb"], make_run(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "module"),
    [("wandb", "wandb"), ("swanlab", "swanlab"), ("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"),
     ("trackio", "trackio")],
)  # fmt: skip
def test_missing_package_is_answered_with_the_extra_to_install(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} is not installed .*pip install 'rm-gallery\[{name}\]'"):
        Trackers([name], make_run(tmp_path))


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, rm_gallery.training.trackers\n"
        "names = ('torch', 'wandb', 'swanlab', 'tensorboard', 'mlflow', 'trackio', 'rich')\n"
        "print([name for name in names if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_defaults_name_known_trackers() -> None:
    assert all(name in TRACKERS for name in TrackerConfig().logger)


def test_lines_of_metrics_with_wrong_types_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    good = '{"step": 1, "time": 1.5, "train/loss": null}\n'
    bad = ('{"step": "1"}', '{"step": true}', "[1]", '{"step": 1, "loss": "x"}', "[" * 100_000, "\ufffd", "null", "1")
    path.write_text(good + "".join(f"{line}\n" for line in bad))
    Trackers(["console"], make_run(tmp_path, start_step=1)).close()
    assert path.read_text() == good


@pytest.mark.parametrize("content", ["[]", "{", "\x00", "[" * 100_000])
def test_a_damaged_file_of_service_ids_starts_a_new_run(content: str, tmp_path: Path, caplog: Any) -> None:
    run = make_run(tmp_path, start_step=1)
    run.run_dir.mkdir()
    (run.run_dir / "tracker_ids.json").write_text(content)
    assert saved_id("wandb", run) is None
    assert "tracker_ids.json cannot be read" in caplog.text
    save_id("wandb", "abc", run.run_dir)
    assert saved_id("wandb", run) == "abc"
