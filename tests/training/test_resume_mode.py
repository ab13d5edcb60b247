"""`trainer.resume_mode`: which checkpoint a run goes on from, and which it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.short_runs import Lost, assert_same_run, lose, rows, train, when_logged, write_data

pytestmark = pytest.mark.slow


@pytest.fixture
def first(in_tmp: Path, trained: Callable[..., Path]) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    write_data()
    return trained("first", "trainer.save_freq=2")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if "step" in path.name)


def test_disable_refuses_a_folder_with_checkpoints(first: Path, qwen2_folder: Path, capsys: Any) -> None:
    train(qwen2_folder, "first", "trainer.resume_mode=disable", status=2)
    assert "holds an earlier run (newest checkpoint global_step_6)" in capsys.readouterr().err
    train(qwen2_folder, "other", "trainer.resume_mode=disable")


def test_a_path_of_another_run_begins_there_and_a_restart_goes_on(
    first: Path, qwen2_folder: Path, monkeypatch: Any
) -> None:
    mode = f"trainer.resume_mode={first / 'global_step_2'}"
    when_logged(monkeypatch, 5, lose)
    with pytest.raises(Lost):
        train(qwen2_folder, "second", mode, "trainer.save_freq=1")
    second = Path("runs/second")
    assert rows(second) == [row for row in rows(first) if 2 < row["step"] <= 5]
    (first / "global_step_2").rename(first / "global_step_2.gone")
    train(qwen2_folder, "second", mode, "trainer.save_freq=1")
    assert rows(second) == [row for row in rows(first) if row["step"] > 2]
    assert checkpoints(second) == ["global_step_3", "global_step_4", "global_step_5", "global_step_6"]


def test_a_path_in_the_same_run_puts_later_checkpoints_aside(first: Path, qwen2_folder: Path) -> None:
    shutil.copytree(first, "runs/whole")
    mode = f"trainer.resume_mode={first.absolute() / 'global_step_2'}"
    train(qwen2_folder, "first", mode, "trainer.save_freq=2")
    assert_same_run(first, Path("runs/whole"))
    names = ["global_step_2", "global_step_4", "global_step_4.superseded", "global_step_6", "global_step_6.superseded"]
    assert checkpoints(first) == names
    train(qwen2_folder, "first", mode, "trainer.save_freq=2")
    assert checkpoints(first) == names, "the same command again finds the run complete"


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        (
            "runs/first/global_step_9",
            "resume_mode=runs/first/global_step_9: no such folder; give a global_step_N folder",
        ),
        ("runs/bare", "resume_mode=runs/bare: no training_state in it; give a global_step_N folder"),
        ("runs/first/global_step_4", "runs/first/global_step_4: training_state/state.json is missing; it is damaged"),
        ("atuo", "resume_mode=atuo: must be auto, disable or the path of a global_step_N folder. Did you mean 'auto'?"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(
    mode: str, sentence: str, first: Path, qwen2_folder: Path, capsys: Any
) -> None:
    Path("runs/bare").mkdir()
    (first / "global_step_4/training_state/state.json").unlink()
    before = checkpoints(first)
    for name in ("first", "second"):
        train(qwen2_folder, name, f"trainer.resume_mode={mode}", status=2)
        assert sentence in capsys.readouterr().err
    assert checkpoints(first) == before
    assert not list(Path("runs").glob("second/global*"))


def test_a_path_beside_a_run_that_did_not_begin_there_is_refused(first: Path, qwen2_folder: Path, capsys: Any) -> None:
    train(qwen2_folder, "second", "trainer.total_training_steps=1")
    train(qwen2_folder, "second", "trainer.resume_mode=runs/first/global_step_2", status=2)
    assert "holds a run (newest checkpoint global_step_1) that did not start from trainer.resume_mode=" in (
        capsys.readouterr().err
    )


def test_checkpoints_without_a_training_state_are_refused(first: Path, qwen2_folder: Path, capsys: Any) -> None:
    for folder in first.glob("global_step_*"):
        shutil.rmtree(folder / "training_state")
    train(qwen2_folder, "first", status=2)
    assert "cannot be resumed (none of its checkpoints holds a training_state)" in capsys.readouterr().err
