"""Local files: what a path, a folder or a glob names, and what identifies a file."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from rm_gallery.data.source.config import FileEntry, Role, refuse_keys
from rm_gallery.data.source.names import checked_kind, data_files, kind_of, of_one_kind
from rm_gallery.data.source.splits import choose_split, splits_by_name
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

LOCAL_SCHEMES = ("file", "local")
_END_BYTES = 64 << 10


def local_path(text: str) -> Path:
    """The path that a text names: `~` is the home folder, the schemes `file` and `local` are taken off."""
    scheme, mark, rest = text.partition("://")
    return Path(rest if mark and scheme in LOCAL_SCHEMES else text).expanduser()


def exists_here(text: str) -> bool:
    """Whether a text names something on this machine as it stands; a glob does not count."""
    try:
        return local_path(text).exists()
    except (OSError, ValueError):  # too long a name, a NUL byte in it
        return False


def expand_local(entry: FileEntry, split: str | None, role: Role, what: str) -> list[Path]:
    """Data files that a local path names, in order.

    split: the split wanted of a folder with several, or None for the one that fits `role`.
    what: begins each sentence. Raises UserError for a path that does not exist or names no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    try:
        found = _expand(entry, split, role, what)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{what[:150]}: cannot be looked up ({error.strerror}); name another path") from error
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
        raise UserError(f"{what}: neither a file nor a folder; write the rows to a file and name that")
    return _expand_glob(path, entry, what) if has_pattern(entry.path) else []


def has_pattern(text: str) -> bool:
    """Whether a path has a mark of a glob in it."""
    return any(mark in text for mark in "*?[")


def _expand_glob(path: Path, entry: FileEntry, what: str) -> list[Path]:
    matching = [name for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not matching:
        raise UserError(f"{what}: no file matches the pattern (working directory {Path.cwd()})")
    # Names are judged one by one: the pattern itself may lie in a hidden folder.
    found = [name for name in matching if data_files([Path(name).name])]
    if not found:
        checked_kind(matching[0], what=f"{what}: matches only {Path(matching[0]).name}")
    refuse_keys(entry, what, "split")
    return [Path(name) for name in of_one_kind(found, what=what, where=f"{Path(found[0]).parent}/")]


def _expand_folder(folder: Path, split: str | None, role: Role, what: str) -> list[Path]:
    splits = _saved_json(folder, "dataset_dict.json", "splits", what)
    if splits is not None:  # what DatasetDict.save_to_disk writes
        names = choose_split({str(name): [str(name)] for name in splits}, split, role, what)
        return _expand_saved(folder / names[0], what)
    if (folder / "state.json").is_file():  # what Dataset.save_to_disk writes
        return _expand_saved(folder, what)
    names = data_files(each.name for each in folder.iterdir() if each.is_file())
    if not names:
        names = data_files(_names_below(folder))
    if not names:
        raise UserError(f"{what}: the folder holds no data file (parquet, JSON lines, CSV, Arrow); name one that does")
    by_split = splits_by_name(names)
    if split is not None or len(by_split) > 1:
        chosen = choose_split(by_split, split, role, what)
        log.info("%s: %d of %d files, those of one split", what, len(chosen), len(names))
        names = chosen
    return [folder / name for name in of_one_kind(names, what=what, where=f"{folder}/")]


def _names_below(folder: Path) -> list[str]:
    return [
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if kind_of(name) is not None
    ]


def _expand_saved(folder: Path, what: str) -> list[Path]:
    """Arrow files of one split that `save_to_disk` wrote; files of an earlier save may lie beside them."""
    listed = _saved_json(folder, "state.json", "_data_files", what)
    try:
        names = [str(each["filename"]) for each in listed] if listed is not None else None
    except (KeyError, TypeError):
        names = None
    if names is None:
        raise UserError(f"{what}: {folder.name}/state.json does not list the data files; save the data set again")
    if not names:
        raise UserError(f"{what}: the data set that was saved there is empty; name another")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{what}: {missing} is missing from {folder.name}; save or copy the data set again")
    return [folder / name for name in names]


def _saved_json(folder: Path, name: str, key: str, what: str) -> list[Any] | None:
    """The list below `key` of a JSON file that `save_to_disk` writes, or None without such a file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value = found.get(key) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{what}: {name} is damaged; save the data set again")
    return value


def identity_of(path: Path) -> str:
    """Hash of the path, size, time of the last change, and first and last 64 KiB of a file."""
    digest = hashlib.sha256()
    stat = path.stat()
    digest.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        if stat.st_size > _END_BYTES:
            file.seek(max(_END_BYTES, stat.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()
