"""Checkpoint folders: complete or not there, damage of every kind is found; how many stay, and the best one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.files import remove, sha256_files
from rm_gallery.training import setup
from rm_gallery.training.checkpoint.folders import (
    clean,
    damage,
    keep_newest,
    list_checkpoints,
    publish,
)
from rm_gallery.training.checkpoint.state import Progress
from tests.training.short_runs import Lost, lose, rows, train, when_logged, write_data

FILES = {"model.safetensors": b"w" * 1000, "config.json": b"{}", "training_state/rank_0_1.safetensors": b"s" * 3000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint."""
    staging = tmp_path / ".global_step_7.saving"
    for name, content in FILES.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content)
    publish(staging, tmp_path / "global_step_7", sha256_files(staging, FILES))
    assert not staging.exists()
    return tmp_path / "global_step_7"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "says"),
    [(flip, "is not what was written"), (cut, "is not what was written"), (Path.unlink, "is missing")],
)
def test_damage_of_any_file_is_found_and_named(
    name: str, harm: Callable[[Path], None], says: str, folder: Path
) -> None:
    assert damage(folder) is None
    harm(folder / name)
    assert damage(folder) == f"{name} {says}"


def test_ranks_share_the_reading(folder: Path) -> None:
    flip(folder / "model.safetensors")
    found = [damage(folder, part=rank, parts=3) for rank in range(3)]
    assert [each for each in found if each] == ["model.safetensors is not what was written"]


@pytest.mark.parametrize("first", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 6))])
def test_any_bit_of_the_list_of_hashes_counts(folder: Path, first: int) -> None:
    """Every flipped bit that changes what the list says is noticed; only white space does not."""
    marker = folder / "manifest.json"
    whole = marker.read_bytes()
    for place in range(first, len(whole), 6):
        for bit in (0, 3, 6):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            marker.write_bytes(bytes(changed))
            try:
                same = json.loads(bytes(changed)) == json.loads(whole)
            except ValueError:
                same = False
            assert (damage(folder) is None) == same, (place, bit)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"format": 1, "sha256": 3}', b"\xff\xfe", b"[" * 9999]
)
def test_a_list_of_hashes_that_is_none_is_damage(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert damage(folder) == "manifest.json cannot be read"


def test_a_later_format_is_not_read(folder: Path) -> None:
    marker = folder / "manifest.json"
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 2'))
    assert damage(folder) == "written in format 2, which this version does not read"


def test_checkpoints_are_listed_by_number_and_others_are_not(tmp_path: Path) -> None:
    for name in ("global_step_10", "global_step_9", "global_step_9.damaged", ".global_step_11.saving", "global_step_x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["global_step_9", "global_step_10"]
    clean(tmp_path)
    remove(tmp_path / "global_step_9")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "global_step_10",
        "global_step_9.damaged",
        "global_step_x",
    ]


def test_publishing_over_a_folder_of_that_name_replaces_it(folder: Path) -> None:
    staging = folder.with_name(".global_step_7.saving")
    (staging / "training_state").mkdir(parents=True)
    (staging / "new").write_text("new")
    publish(staging, folder, sha256_files(staging, ["new"]))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "new", "training_state"]
    assert damage(folder) is None


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
        found.append(progress.note_best({"val/accuracy": accuracy}))
    assert found == [False, True, False, False, True]
    assert (progress.best_step, progress.best_accuracy) == (5, 0.6)


@pytest.mark.slow
def test_a_run_keeps_two_and_its_best_over_starts(in_tmp: Path, qwen2_folder: Path, monkeypatch: Any) -> None:
    """Accuracies by step; lost after the validation of step 4, and so after the checkpoint of step 3."""
    write_data()
    accuracies = {1: 0.5, 2: 0.75, 3: 0.25, 4: 0.75, 5: 0.5, 6: 0.125}
    original = setup._build_trainer

    def with_accuracies(*arguments: Any) -> Any:
        trainer = original(*arguments)
        trainer.validate = lambda look: {"val/accuracy": accuracies[trainer.progress.step]}
        return trainer

    monkeypatch.setattr(setup, "_build_trainer", with_accuracies)
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
