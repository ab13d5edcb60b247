"""How many checkpoints stay, and that the best one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.training import build
from rm_gallery.training.checkpoint.progress import Progress
from rm_gallery.training.checkpoint.retention import keep_newest
from tests.training.short_runs import Lost, lose, rows, train, when_logged, write_data


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in run.glob("global_step_*"))


@pytest.mark.parametrize(
    ("number", "best", "left"),
    [(None, None, [1, 2, 3, 10]), (2, None, [3, 10]), (1, 2, [2, 10]), (9, 1, [1, 2, 3, 10])],
)
def test_the_newest_stay_and_the_best(number: int | None, best: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        (tmp_path / f"global_step_{step}").mkdir()
    keep_newest(tmp_path, number, best)
    assert steps(tmp_path) == left


def test_the_first_of_equal_accuracies_is_the_best_and_nan_never() -> None:
    progress = Progress()
    found = []
    for step, accuracy in enumerate([float("nan"), 0.5, 0.5, 0.4, 0.6], start=1):
        progress.step = step
        found.append(progress.note_accuracy({"val/accuracy": accuracy}))
    assert found == [False, True, False, False, True]
    assert (progress.best_step, progress.best_accuracy) == (5, 0.6)


def test_a_run_keeps_two_and_its_best_over_starts(in_tmp: Path, qwen2_folder: Path, monkeypatch: Any) -> None:
    """Accuracies by step; lost after the validation of step 4, and so after the checkpoint of step 3."""
    write_data()
    accuracies = {1: 0.5, 2: 0.75, 3: 0.25, 4: 0.75, 5: 0.5, 6: 0.125}
    original = build._build_trainer

    def with_accuracies(*arguments: Any) -> Any:
        trainer = original(*arguments)
        trainer.validate = lambda look: {"val/accuracy": accuracies[trainer.progress.step]}
        return trainer

    monkeypatch.setattr(build, "_build_trainer", with_accuracies)
    settings = ("trainer.save_best=true", "trainer.max_ckpt_to_keep=2", "trainer.test_freq=1", "trainer.save_freq=3")
    when_logged(monkeypatch, 4, lose, val=True)
    with pytest.raises(Lost):
        train(qwen2_folder, "run", *settings)
    run = Path("runs/run")
    assert steps(run) == [2, 3], "step 1 was the best for a while; 2 is now, and 3 was due"
    train(qwen2_folder, "run", *settings)
    assert steps(run) == [2, 3, 6]
    assert json.loads((run / "best.json").read_text()) == {
        "checkpoint": "global_step_2", "step": 2, "val/accuracy": 0.75,
    }  # fmt: skip
    assert [row["val/accuracy"] for row in rows(run) if "val/accuracy" in row] == list(accuracies.values())
