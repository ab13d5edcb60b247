"""Saving goes wrong in every way: earlier checkpoints are whole, and the next start goes on exactly."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.training.checkpoint import save
from rm_gallery.training.checkpoint.folders import damage
from rm_gallery.training.checkpoint.save import WeightsFolder
from tests.training.short_runs import Lost, assert_same_run, train, when_logged, write_data


@pytest.fixture
def whole(in_tmp: Path, qwen2_folder: Path) -> Path:
    """A run that nothing happens to."""
    write_data()
    return train(qwen2_folder, "whole")


@contextmanager
def small_files(size: int) -> Iterator[Callable[[], None]]:
    """What it gives makes writes beyond so many bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("where", ["tensors", "weights"])
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_ends_the_run_in_words_and_the_one_before_is_used(
    where: str, background: str, whole: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    settings = ("trainer.save_freq=2", f"trainer.async_save={background}")
    size = 200_000 if where == "tensors" else 60_000
    with small_files(size) as fill, monkeypatch.context() as patch:
        if where == "tensors":
            when_logged(patch, 4, fill)
        else:
            original = WeightsFolder.write

            def on_full_disk(self: WeightsFolder, folder: Path, state: Path) -> list[str]:
                if folder.name == ".global_step_4.saving":
                    fill()
                return original(self, folder, state)

            patch.setattr(WeightsFolder, "write", on_full_disk)
        parts = train(qwen2_folder, "parts", *settings, status=2)
    sentence = "runs/parts/global_step_4: the checkpoint could not be written ("
    assert sentence in capsys.readouterr().err
    assert [path.name for path in parts.glob("*global_step*")] == ["global_step_2"]
    train(qwen2_folder, "parts", *settings)
    assert_same_run(parts, whole)


@pytest.mark.parametrize("place", ["dcp.save", "sha256_files", "publish"])
def test_lost_in_the_middle_of_a_save(
    place: str, whole: Path, qwen2_folder: Path, monkeypatch: Any, caplog: Any
) -> None:
    module, _, name = place.rpartition(".")
    owner = getattr(save, module) if module else save
    original, calls = getattr(owner, name), iter(range(100))

    def dies(*arguments: Any, **options: Any) -> Any:
        if any(".global_step_4.saving" in str(value) for value in (*arguments, *options.values())):
            if place != "publish":
                original(*arguments, **options)
            raise Lost
        next(calls)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Lost):
            train(qwen2_folder, "parts", "trainer.save_freq=2")
    parts = Path("runs/parts")
    assert sorted(path.name for path in parts.glob("*global_step*")) == [".global_step_4.saving", "global_step_2"]
    train(qwen2_folder, "parts", "trainer.save_freq=2")
    assert "removed what a save that was cut short has left: .global_step_4.saving" in caplog.text
    assert "going on after step 2" in caplog.text
    assert not (parts / ".global_step_4.saving").exists()
    assert_same_run(parts, whole)


def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_used(
    whole: Path, qwen2_folder: Path, caplog: Any
) -> None:
    parts = train(qwen2_folder, "parts", "trainer.save_freq=2")
    for step, name in ((6, "training_state/__0_0.distcp"), (4, "training_state/rank_0.json")):
        path = parts / f"global_step_{step}" / name
        path.write_bytes(path.read_bytes()[:-2])
    train(qwen2_folder, "parts", "trainer.save_freq=2")
    for step, name in ((6, "__0_0.distcp"), (4, "rank_0.json")):
        sentence = (
            f"runs/parts/global_step_{step} is damaged (training_state/{name} is not what was written): renamed to "
            f"global_step_{step}.damaged, going on with the one before"
        )
        assert sentence in caplog.text
    assert_same_run(parts, whole)
    assert damage(parts / "global_step_6") is None


def test_when_no_checkpoint_is_whole_the_run_begins_again(whole: Path, qwen2_folder: Path, caplog: Any) -> None:
    parts = train(qwen2_folder, "parts")
    (parts / "global_step_6/model.safetensors").write_bytes(b"")
    train(qwen2_folder, "parts")
    assert "no other checkpoint is there: the run begins at step 0" in caplog.text
    assert_same_run(parts, whole)
    assert len(list(parts.glob("metrics-*.jsonl"))) == 1, "metrics of the first start keep another name"


def test_saves_in_the_background_give_the_same_files(whole: Path, qwen2_folder: Path) -> None:
    runs = [
        train(qwen2_folder, f"background-{value}", f"trainer.async_save={value}", "trainer.save_freq=1")
        for value in ("false", "true")
    ]
    assert_same_run(runs[1], whole)
    for step in range(1, 7):
        one, other = (run / f"global_step_{step}" for run in runs)
        assert damage(other) is None
        names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
        assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
        for name in ("model.safetensors", "manifest.json", "training_state/rank_0.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_wrong_reward_of_a_background_save_ends_the_run(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_data()
    monkeypatch.setattr(WeightsFolder, "expected", lambda self: [9.0] * 8)
    train(qwen2_folder, "run", "trainer.async_save=true", "trainer.save_freq=2", status=2)
    assert "runs/run/global_step_2: reloaded, it gives text 0 the reward" in capsys.readouterr().err
