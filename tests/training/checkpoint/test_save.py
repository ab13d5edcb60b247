"""Saving goes wrong in every way: earlier checkpoints are whole, and the next start goes on exactly."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.files import sha256
from rm_gallery.training.checkpoint import save
from rm_gallery.training.checkpoint.folders import damage
from rm_gallery.training.checkpoint.save import WeightsFolder
from tests.training.short_runs import Lost, assert_same_run, train, when_logged, write_data

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(in_tmp: Path, trained: Callable[..., Path]) -> Path:
    """A run that nothing happens to."""
    write_data()
    return trained("whole")


@contextmanager
def small_files(size: int) -> Iterator[Callable[[], None]]:
    """What it gives makes writes beyond so many bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("where", "background"),
    [
        ("weights", "false"),
        ("tensors", "true"),
        pytest.param("tensors", "false", marks=pytest.mark.slow),
        pytest.param("weights", "true", marks=pytest.mark.slow),
    ],
)
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

            def on_full_disk(self: WeightsFolder, folder: Path, *arguments: Any, **options: Any) -> dict[str, str]:
                if folder.name == ".global_step_4.saving":
                    fill()
                return original(self, folder, *arguments, **options)

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
    assert "removed partial checkpoints: .global_step_4.saving" in caplog.text
    assert "resuming from step 2 of " in caplog.text
    assert not (parts / ".global_step_4.saving").exists()
    assert_same_run(parts, whole)


def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_used(
    whole: Path, trained: Callable[..., Path], qwen2_folder: Path, caplog: Any
) -> None:
    parts = trained("parts", "trainer.save_freq=2")
    for step, name in ((6, "training_state/rank_0_1.safetensors"), (4, "training_state/rank_0.json")):
        path = parts / f"global_step_{step}" / name
        path.write_bytes(path.read_bytes()[:-2])
    train(qwen2_folder, "parts", "trainer.save_freq=2")
    for step, name in ((6, "rank_0_1.safetensors"), (4, "rank_0.json")):
        sentence = (
            f"runs/parts/global_step_{step} is damaged (training_state/{name} is not what was written): renamed to "
            f"global_step_{step}.damaged, trying the previous checkpoint"
        )
        assert sentence in caplog.text
    assert_same_run(parts, whole)
    assert damage(parts / "global_step_6") is None


def test_when_no_checkpoint_is_whole_the_run_begins_again(
    whole: Path, trained: Callable[..., Path], qwen2_folder: Path, caplog: Any
) -> None:
    parts = trained("parts")
    (parts / "global_step_6/model.safetensors").write_bytes(b"")
    train(qwen2_folder, "parts")
    assert "no intact checkpoint is left: training starts from scratch" in caplog.text
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
        for name in ("model.safetensors", "config.json", "training_state/rank_0.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_wrong_reward_of_a_background_save_ends_the_run(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_data()
    monkeypatch.setattr(WeightsFolder, "expected", lambda self: [9.0] * 8)
    train(qwen2_folder, "run", "trainer.async_save=true", "trainer.save_freq=2", status=2)
    assert "runs/run/global_step_2: the reloaded model gives text 0 the reward" in capsys.readouterr().err


def test_weights_are_hashed_twice_per_save(in_tmp: Path, qwen2_folder: Path, monkeypatch: Any) -> None:
    """Counts the bytes: twice the weights (as written, and as read back), and all other files once."""
    write_data()
    counted = [0]
    digest, file_digest = hashlib.sha256, hashlib.file_digest

    class Counted:
        def __init__(self, data: bytes = b"") -> None:
            self._hash = digest()
            self.update(data)

        def update(self, data: Any) -> None:
            counted[0] += memoryview(data).nbytes
            self._hash.update(data)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    def counted_file(file: Any, name: str) -> Any:
        counted[0] += os.fstat(file.fileno()).st_size
        return file_digest(file, name)

    original = save._Save._finish_folder

    def counting(self: Any, hashes: dict[str, str]) -> None:
        counted[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "sha256", Counted)
            patch.setattr(hashlib, "file_digest", counted_file)
            original(self, hashes)

    monkeypatch.setattr(save._Save, "_finish_folder", counting)
    folder = train(qwen2_folder, "run") / "global_step_6"
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    by_other_code = {name for name in sizes if name.startswith("training_state/rank_")}
    once = sum(size for name, size in sizes.items() if name not in {*by_other_code, "manifest.json"})
    assert counted[0] == once + sizes["model.safetensors"]


def test_a_checkpoint_of_an_earlier_version_resumes(whole: Path, qwen2_folder: Path) -> None:
    """Its manifest.json lists the model only, and training_state/complete.json lists everything."""
    parts = train(qwen2_folder, "parts", "trainer.save_freq=2")
    shutil.rmtree(parts / "global_step_6")
    for folder in parts.glob("global_step_*"):
        hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
        of_model = {name: value for name, value in hashes.items() if "/" not in name}
        (folder / "manifest.json").write_text(json.dumps({"sha256": of_model}))
        hashes["manifest.json"] = sha256(folder / "manifest.json")
        (folder / "training_state/complete.json").write_text(json.dumps({"format": 1, "sha256": hashes}))
        assert damage(folder) is None
    flipped = parts / "global_step_4/training_state/rank_0.json"
    flipped.write_bytes(flipped.read_bytes()[:-1])
    train(qwen2_folder, "parts", "trainer.save_freq=2")
    assert (parts / "global_step_4.damaged").is_dir()
    assert_same_run(parts, whole)
