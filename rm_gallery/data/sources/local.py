"""Local files: expanding paths, folders and globs, and the identity of a file."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rm_gallery.data.sources.config import FileEntry, Role, refuse_keys
from rm_gallery.data.sources.records import KNOWN, DataFile, checked_kind, data_files, kind_of, of_one_kind
from rm_gallery.data.sources.splits import choose_split, report_choice, some, splits_by_name
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

LOCAL_SCHEMES = ("file", "local")
_END_BYTES = 64 << 10


def local_path(text: str) -> Path:
    """The path that a text names, without the schemes `file` and `local`; `~` is the home folder."""
    scheme, mark, rest = text.partition("://")
    return Path(rest if mark and scheme in LOCAL_SCHEMES else text).expanduser()


def exists_here(text: str) -> bool:
    """Whether a text, taken literally and not as a glob, names a file, folder or link on this machine."""
    try:
        return os.path.lexists(local_path(text))
    except (OSError, ValueError):  # too long a name, a NUL byte in it
        return False


def expand_local(entry: FileEntry, split: str | None, role: Role, what: str) -> list[Path]:
    """Data files that a local path names, in order.

    split: the split of a folder with several, or None for the default of `role`.
    what: start of messages. Raises UserError for a path that does not exist or names no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    try:
        found = _expand(entry, split, role, what)
    except OSError as error:  # too long a name, or a folder without read permission
        raise UserError(f"{what[:150]}: cannot be looked up ({error.strerror}); choose another path") from error
    if not found:
        raise UserError(f"{what}: no such file or folder (working directory {Path.cwd()})")
    return found


def _expand(entry: FileEntry, split: str | None, role: Role, what: str) -> list[Path]:
    path = local_path(entry.path)
    if path.is_dir():
        return _expand_folder(path, split, role, what)
    if path.is_file():
        checked_kind(path.name, what=what)
        refuse_keys(entry, what, "split")
        return [path]
    if path.exists():
        raise UserError(f"{what}: neither a file nor a folder; write the rows to a file and name it")
    if path.is_symlink():
        raise UserError(f"{what}: a broken symbolic link (to {os.readlink(path)}); name the file itself")
    return _expand_glob(path, entry, what) if has_pattern(entry.path) else []


def has_pattern(text: str) -> bool:
    """Whether a path contains a wildcard."""
    return any(mark in text for mark in "*?[")


def _expand_glob(path: Path, entry: FileEntry, what: str) -> list[Path]:
    names = _without_loops(sorted(glob.glob(str(path), recursive=True)))
    matching, skipped = _regular_files(Path(), names)
    _warn_of_skipped(skipped, what)
    if not matching:
        raise UserError(f"{what}: no file matches the pattern (working directory {Path.cwd()})")
    # Only the names count: the pattern itself may be in a hidden folder.
    found = [name for name in matching if data_files([Path(name).name])]
    if not found:
        checked_kind(matching[0], what=f"{what}: matches only {Path(matching[0]).name}")
    refuse_keys(entry, what, "split")
    return [Path(name) for name in of_one_kind(found, what=what, where=f"{Path(found[0]).parent}/")]


def _expand_folder(folder: Path, split: str | None, role: Role, what: str) -> list[Path]:
    splits = _saved_json(folder, "dataset_dict.json", "splits", what)
    if splits is not None:  # what DatasetDict.save_to_disk writes
        names = choose_split({str(name): [str(name)] for name in splits}, split, role, what)
        report_choice(names, [str(name) for name in splits], split, what)
        return [path for name in names for path in _expand_saved(folder / name, what)]
    if (folder / "state.json").is_file():  # what Dataset.save_to_disk writes
        return _expand_saved(folder, what)
    found, skipped = _regular_files(folder, [each.name for each in folder.iterdir()])
    if data_files(found):
        _warn_of_subfolders(folder, what)
    else:
        found, skipped = _regular_files(folder, list(_names_below(folder)))
    _warn_of_skipped(skipped, what)
    names = data_files(found)
    unread = sorted(name for name in found if name.lower().endswith(_UNREAD) and kind_of(name) is None)
    if names and unread:
        log.warning("%s: not read: %s; convert to one of %s", what, some(unread), KNOWN)
    if not names:
        raise UserError(f"{what}: the folder has no data file (parquet, JSON lines, CSV, Arrow); name one that does")
    by_split = splits_by_name(names)
    if split is not None or (len(by_split) > 1 and role != "all"):
        chosen = choose_split(by_split, split, role, what)
        report_choice(chosen, names, split, what)
        names = chosen
    if role != "all":
        names = of_one_kind(names, what=what, where=f"{folder}/")
    return [folder / name for name in names]


# Tables and archives; other files, such as pages and scripts, are not taken for data.
_UNREAD = (
    ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".gz", ".zst", ".7z", ".xls", ".xlsx", ".ods", ".pkl", ".pickle",
    ".npy", ".npz", ".sqlite", ".db", ".avro", ".orc", ".txt",
)  # fmt: skip


def _warn_of_subfolders(folder: Path, what: str) -> None:
    """Subfolders are read only where the folder itself has no data."""
    try:
        below = (name for name in _names_below(folder) if "/" in name and data_files([name]))
        first = next(below, None)
    except OSError:  # a subfolder that cannot be listed: it is not needed
        return
    if first is not None:
        log.warning("%s: files in subfolders are not read, e.g. %s; move them, or name them with a glob", what, first)


def _names_below(folder: Path) -> Iterator[str]:
    """Names like those of data files in the subfolders, each folder once however many symbolic links lead to it.

    Raises OSError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(each for each in folders if not each.startswith((".", "__")))
        if real not in seen:
            yield from (Path(parent, name).relative_to(folder).as_posix() for name in names if kind_of(name))
        seen.add(real)


def _without_loops(names: Sequence[str]) -> list[str]:
    """The names without those of the same file in a folder that a symbolic link repeats."""
    places = {(os.path.realpath(os.path.dirname(name)), os.path.basename(name)): name for name in reversed(names)}
    kept = set(places.values())
    return [name for name in names if name in kept]


def _regular_files(folder: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The regular files, and what else is named like a data file: opening a pipe would wait for its writer."""
    files, others = [], []
    for name in names:
        path = folder / name
        if path.is_file():
            files.append(name)
        elif data_files([path.name]):
            others.append(f"{name} ({_type_of(path)})")
    return files, others


def _type_of(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken symbolic link" if path.is_symlink() else "cannot be looked up"
    types = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((label for matches, label in types if matches(mode)), "a device")


def _warn_of_skipped(skipped: Sequence[str], what: str) -> None:
    if skipped:
        log.warning("%s: skipped %s: not a regular file", what, some(skipped))


def _expand_saved(folder: Path, what: str) -> list[Path]:
    """Arrow files of one split that `save_to_disk` wrote; the folder may also hold files of an earlier save."""
    listed = _saved_json(folder, "state.json", "_data_files", what)
    try:
        names = [str(each["filename"]) for each in listed] if listed is not None else None
    except (KeyError, TypeError):
        names = None
    if names is None:
        raise UserError(f"{what}: {folder.name}/state.json does not list the data files; save the dataset again")
    if not names:
        raise UserError(f"{what}: the saved dataset is empty; choose another")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{what}: {missing} is missing from {folder.name}; save or copy the dataset again")
    return [folder / name for name in names]


def _saved_json(folder: Path, name: str, key: str, what: str) -> list[Any] | None:
    """The list under `key` in a JSON file of `save_to_disk`, or None without such a file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value = found.get(key) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{what}: {name} is damaged; save the dataset again")
    return value


def identity_of(path: Path) -> str:
    """Hash of the path, size, times of the last modification and status change, and both ends of a file.

    Programs can set the modification time but not the status change time (ctime), so that an edit in the middle that
    keeps size and modification time is noticed too. A change of permissions or links then counts as an edit.
    """
    digest = hashlib.sha256()
    facts = path.stat()
    times = f"{facts.st_mtime_ns}\0{facts.st_ctime_ns}"
    digest.update(f"{path.absolute()}\0{facts.st_size}\0{times}\0".encode(errors="surrogateescape"))
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        if facts.st_size > _END_BYTES:
            file.seek(max(_END_BYTES, facts.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def version_of(path: Path) -> str:
    """Size, modification time and inode of a file: whether it is still the same while it is read."""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"


def check_unchanged(file: DataFile) -> None:
    """Raise OSError if a local file changed since it was resolved, as its rows would be of two versions.

    A file that was deleted can still be read to its end.
    """
    try:
        changed = version_of(Path(file.path)) != file.version
    except FileNotFoundError:
        return
    if changed:
        raise OSError("the file changed during this run; run again when its writer is done")
