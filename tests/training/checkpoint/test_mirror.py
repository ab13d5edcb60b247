"""Copies of checkpoints at another place: complete, caught up with, and good enough to go on from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rm_gallery.training.checkpoint.folders import damage
from tests.training.short_runs import train, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> Iterator[None]:
    write_data()
    yield
    MemoryFileSystem.store.clear()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_every_checkpoint_is_copied(protocol: str, qwen2_folder: Path) -> None:
    root = f"{Path.cwd()}/copies" if protocol == "file" else "/copies"
    run = train(
        qwen2_folder, "run", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=1",
        f"trainer.default_hdfs_dir={protocol}:/" + f"/{root}",
    )  # fmt: skip
    there = fsspec.filesystem(protocol)
    names = sorted(path.rpartition("/")[2] for path in there.ls(f"{root}/run", detail=False))
    assert names == ["global_step_2", "global_step_4", "global_step_6"], "nothing is deleted there"
    assert [path.name for path in run.glob("global_step_*")] == ["global_step_6"]
    copied = {
        path.partition("/global_step_6/")[2]: there.cat_file(path) for path in there.find(f"{root}/run/global_step_6")
    }
    assert copied == files(run / "global_step_6")


def test_a_run_goes_on_from_a_copy_when_its_folder_is_gone(
    qwen2_folder: Path, trained: Callable[..., Path], caplog: Any
) -> None:
    copies = "trainer.default_hdfs_dir=memory://copies"
    whole = trained("whole")
    constant = train(qwen2_folder, "run", "trainer.save_freq=2", copies)
    shutil.rmtree(constant)
    there = fsspec.filesystem("memory")
    there.rm("/copies/run/global_step_6/manifest.json")  # as if the copying had not come so far
    train(qwen2_folder, "run", copies)
    assert "downloaded memory://copies/run/global_step_4" in caplog.text
    assert "resuming from step 4 of " in caplog.text
    ours, theirs = (run / "global_step_6/model.safetensors" for run in (constant, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert damage(constant / "global_step_6") is None


def test_a_url_names_the_checkpoint_to_begin_with(qwen2_folder: Path) -> None:
    whole = train(qwen2_folder, "whole", "trainer.save_freq=3", "trainer.default_hdfs_dir=memory://copies")
    run = train(qwen2_folder, "run", "trainer.resume_mode=memory://copies/whole/global_step_3")
    assert sorted(path.name for path in run.glob("global*")) == ["global_step_3", "global_step_6"]
    train(qwen2_folder, "run", "trainer.resume_mode=memory://copies/whole/global_step_3")
    ours, theirs = (each / "global_step_6/model.safetensors" for each in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_damaged_copy_is_refused_by_name(qwen2_folder: Path, capsys: Any) -> None:
    copies = "trainer.default_hdfs_dir=memory://copies"
    shutil.rmtree(train(qwen2_folder, "run", copies))
    fsspec.filesystem("memory").pipe("/copies/run/global_step_6/model.safetensors", b"nothing")
    train(qwen2_folder, "run", copies, status=2)
    sentence = "memory://copies/run/global_step_6: model.safetensors is not what was written; it is damaged"
    assert sentence in capsys.readouterr().err


def test_a_copy_that_fails_is_told_and_made_later(qwen2_folder: Path, monkeypatch: Any, caplog: Any) -> None:
    original, failures = MemoryFileSystem.put_file, iter([True, False])

    def fails_once(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(failures, False):
            raise OSError("connection\nlost")
        return original(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fails_once)
    with caplog.at_level(logging.WARNING):
        train(qwen2_folder, "run", "trainer.default_hdfs_dir=memory://copies")
    assert "global_step_6 is not copied to memory://copies/run yet: connection lost" in caplog.text
    assert fsspec.filesystem("memory").exists("/copies/run/global_step_6/manifest.json")


@pytest.mark.parametrize("url", ["nowhere://copies", "/proc/nothing/copies"])
def test_a_place_that_cannot_be_reached_is_refused_before_training(url: str, qwen2_folder: Path, capsys: Any) -> None:
    run = train(qwen2_folder, "run", f"trainer.default_hdfs_dir={url}", status=2)
    assert f"trainer.default_hdfs_dir={url}/run: cannot be reached (" in capsys.readouterr().err
    assert not (run / "metrics.jsonl").exists()
