"""Files: written as a whole or not at all, locked against other processes, and compared by their hashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rm_gallery import files
from rm_gallery.files import (
    atomic_write,
    check_manifest,
    lock,
    remove,
    sha256,
    sha256_files,
    write_manifest,
    write_text,
)

HOLD = """
import pathlib, sys
from rm_gallery.files import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("one", "two"):
        with atomic_write(folder) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).write_text(name)
    assert os.listdir(folder / "inner") == ["two"] and os.listdir(tmp_path) == ["folder"]
    remove(folder)
    remove(folder)
    assert os.listdir(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("killed", [False, True])
def test_a_lock_is_free_once_its_process_ends_however_it_ends(killed: bool, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    waited: list[str] = []
    with pytest.raises(TimeoutError, match=f"process {holder.pid} on "), lock(path, timeout=0, on_wait=waited.append):
        pass
    assert waited == []
    with pytest.raises(TimeoutError), lock(path, timeout=0.1, on_wait=waited.append):
        pass
    assert len(waited) == 1 and waited[0].startswith(f"process {holder.pid} on ")
    if killed:
        holder.kill()
    holder.communicate()
    with lock(path, timeout=0):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(TimeoutError), lock(path, timeout=0):
            pass
    with lock(path, timeout=0):
        pass


def test_a_file_system_without_locks_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path / "lock", timeout=0):
        pass


def test_damage_is_described(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    hashes = sha256_files(tmp_path, ["a", "b"])
    assert hashes["a"] == sha256(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    write_manifest(tmp_path, hashes)
    assert check_manifest(tmp_path) is None
    (tmp_path / "b").write_text("B")
    assert check_manifest(tmp_path) == "b is not what was written"
    (tmp_path / "a").unlink()
    assert check_manifest(tmp_path) == "a is missing"


def test_a_file_changed_on_purpose_is_renewed_in_the_manifests_that_list_it(tmp_path: Path) -> None:
    inner = tmp_path / "ema"
    inner.mkdir()
    for folder in (tmp_path, inner):
        (folder / "README.md").write_text("card")
        (folder / "weights").write_text("1")
    files.write_manifest(inner, files.sha256_files(inner, ["README.md", "weights"]))
    listed = ["README.md", "ema/README.md", "ema/weights", "ema/manifest.json", "weights"]
    files.write_manifest(tmp_path, files.sha256_files(tmp_path, listed))
    for changed in (tmp_path / "README.md", inner / "README.md"):
        changed.write_text("card with figures")
        assert files.check_manifest(tmp_path) is not None
        files.renew_in_manifests(changed)
        assert files.check_manifest(tmp_path) is None and files.check_manifest(inner) is None
    (inner / "weights").write_text("2")
    files.renew_in_manifests(inner / "README.md")
    assert files.check_manifest(inner) == "weights is not what was written"
