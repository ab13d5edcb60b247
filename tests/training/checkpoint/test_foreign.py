"""A checkpoint that someone else wrote, manifest included: nothing in it is executed, nothing outside of it is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch.distributed.checkpoint as dcp

from rm_gallery.files import check_manifest, is_inside, manifest_names, sha256
from rm_gallery.training.checkpoint.folders import damage
from rm_gallery.training.checkpoint.mirror import download
from rm_gallery.training.checkpoint.state import quiet
from rm_gallery.training.checkpoint.tensor_files import open_reader
from tests.training.short_runs import assert_same_run, train, write_data


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.fixture
def run(in_tmp: Path, trained: Callable[..., Path]) -> Path:
    """A run with checkpoints after steps 3 and 6."""
    write_data()
    return trained("run", "trainer.save_freq=3")


def rewrite_manifest(folder: Path, name: str = "manifest.json") -> None:
    """List all files with their hashes, as the author of a checkpoint can."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    hashes = {each: sha256(folder / each) for each in names if each != name}
    (folder / name).write_text(json.dumps({"format": 1, "sha256": hashes}))


def as_earlier_version(folder: Path) -> None:
    """Replace the tensor files by those of DCP's own writer."""
    state = folder / "training_state"
    reader = open_reader(state, [path.name for path in state.iterdir()])
    tensors = {name: reader.read_tensor(name) for name in reader.entries}  # type: ignore[union-attr]
    quiet()
    dcp.save(tensors, checkpoint_id=state)
    for path in state.glob("rank_*.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["this", "earlier"])
def test_no_file_of_a_checkpoint_is_executed(version: str, run: Path, qwen2_folder: Path, capsys: Any) -> None:
    """Each file in turn is a pickle that creates a file, and the manifest has its hash."""
    folder = run / "global_step_6"
    if version == "earlier":
        as_earlier_version(folder)
    shutil.copytree(folder, "whole")
    files = [path.relative_to("whole").as_posix() for path in Path("whole").rglob("*") if path.is_file()]
    of_model = [name for name in files if "/" not in name and name != "manifest.json"]
    for names in ([name] for name in files if name not in of_model):
        refused = replaced_by_pickles(folder, names, qwen2_folder, status=2)
        error = capsys.readouterr().err
        assert "Traceback" not in error and "global_step_6" in error.splitlines()[-1], (refused, error)
    replaced_by_pickles(folder, of_model, qwen2_folder, status=0)  # resuming does not read them


def replaced_by_pickles(folder: Path, names: list[str], model: Path, *, status: int) -> list[str]:
    shutil.rmtree(folder)
    shutil.copytree("whole", folder)
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Evil()))
    if names != ["manifest.json"]:
        rewrite_manifest(folder)
    train(model, "run", f"trainer.resume_mode={folder.absolute()}", status=status)
    assert not Path("pwned").exists(), names
    return names


@pytest.mark.slow
def test_a_checkpoint_with_the_tensor_files_of_an_earlier_version_resumes(
    run: Path, trained: Callable[..., Path], qwen2_folder: Path
) -> None:
    whole = trained("whole")
    shutil.rmtree(run / "global_step_6")
    as_earlier_version(run / "global_step_3")
    for name in ("training_state/complete.json", "manifest.json"):
        rewrite_manifest(run / "global_step_3", name)
    train(qwen2_folder, "run", "trainer.save_freq=3")
    assert_same_run(run, whole)


NAMES = ["../other/secret", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "C:\\x", "..\\x", "a\0b", "a/./b", "C:x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_lists_a_file_outside_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/secret").write_text("secret")
    content = json.dumps({"format": 1, "sha256": {name: sha256(tmp_path / "other/secret")}})
    (tmp_path / "folder/manifest.json").write_text(content)
    assert check_manifest(tmp_path / "folder") == f"manifest.json lists {name!r}, which is not a file of this folder"
    with pytest.raises(ValueError, match="which is not a file of this folder"):
        manifest_names(content.encode())
    assert is_inside("training_state/rank_0.json") and is_inside(".metadata")


def test_a_download_writes_no_file_outside_of_its_folder(in_tmp: Path) -> None:
    there = fsspec.filesystem("memory")
    hashes = {"../../evil": "0", "training_state/state.json": "0"}
    there.pipe("/copies/global_step_3/manifest.json", json.dumps({"format": 1, "sha256": hashes}).encode())
    there.pipe("/copies/global_step_3/training_state/state.json", b"{}")
    there.pipe("/evil", b"evil")
    with pytest.raises(ValueError, match=r"cannot be downloaded .*lists '\.\./\.\./evil'"):
        download("memory://copies/global_step_3", Path("runs/run"))
    assert not Path("evil").exists() and not list(Path("runs/run").glob("global*"))


def test_links_are_followed_to_regular_files_only(tmp_path: Path) -> None:
    """As in the cache of the hub; the hash must match. A device or a pipe would block, or never end."""
    (tmp_path / "global_step_1").mkdir()
    (tmp_path / "blob").write_text("content")
    link = tmp_path / "global_step_1/file"
    link.symlink_to(tmp_path / "blob")
    rewrite_manifest(tmp_path / "global_step_1")
    assert damage(tmp_path / "global_step_1") is None
    os.mkfifo(tmp_path / "pipe")
    for target in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "nothing", link):
        link.unlink()
        link.symlink_to(target)
        assert damage(tmp_path / "global_step_1") == "file is missing"
