"""Resolving entries to data files: an entry is a local path, a URL or a dataset of the hub."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rm_gallery.data.sources import hub
from rm_gallery.data.sources.config import FileEntry, Files, Role, SourceConfig, as_entries, entries_of, role_of
from rm_gallery.data.sources.local import (
    exists_here,
    expand_local,
    has_pattern,
    identity_of,
    local_path,
    version_of,
)
from rm_gallery.data.sources.records import MAX_ROW_BYTES, DataFile, checked_kind, without_query
from rm_gallery.data.sources.remote import expand_remote, is_url
from rm_gallery.errors import UserError, one_line


def find_files(files: Files | Sequence[str | FileEntry], *, key: str) -> list[Path]:
    """Local data files that the value of a key names, in order; URLs and hub datasets are not looked up.

    A check before the files are resolved, so what `resolve_files` warns about is not logged here.
    Raises UserError for a local path that does not exist or holds no data, and for a value that names nothing.
    """
    found: list[Path] = []
    with _without_warnings():
        for entry in _named(as_entries(files), key):
            if _place_of(entry.path) == "local":
                found += expand_local(entry, entry.split, role_of(key), _what(entry, key))
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    package = logging.getLogger(__package__)
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def resolve_files(config: SourceConfig, *, key: str) -> list[DataFile]:
    """The files of `data.train_files` or `data.val_files`, by `key`, in order.

    Downloads files of hub datasets that are not cached. `DataFile.entry` counts `entries_of(config, key)`.
    Raises UserError for a path that does not exist, cannot be reached, or is repeated.
    """
    role = role_of(key)
    split = config.val_split if role == "val" else config.train_split
    return resolve_entries(
        entries_of(config, key),
        key=key,
        role=role,
        split=split,
        revision=config.revision,
        max_row_bytes=config.max_row_bytes,
    )


def resolve_entries(
    files: Files | Sequence[str | FileEntry],
    *,
    key: str,
    role: Role = "all",
    split: str | None = None,
    revision: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> list[DataFile]:
    """The files that paths or entries name, in order: what `resolve_files` does for a command with its own option.

    key: the option, for messages, e.g. `--input`. role: which split to use of a folder or dataset with several when
    neither the entry nor `split` names one; `all` uses every split.
    Raises UserError as `resolve_files`.
    """
    found: list[DataFile] = []
    for place, entry in enumerate(_named(as_entries(files), key)):
        found += _resolve(entry, place, role, entry.split or split, entry.revision or revision, _what(entry, key))
    found = [replace(file, max_row_bytes=max_row_bytes) for file in found]
    seen: dict[str, DataFile] = {}
    for file in found:
        if file.path in seen:
            raise UserError(f"{key}: {file.name} is listed twice; list it once, with a weight of 2 to use it twice")
        seen[file.path] = file
    return found


def _named(entries: Sequence[FileEntry], key: str) -> Sequence[FileEntry]:
    if not entries:
        raise UserError(f"{key} names no file; set it to a file, a folder, a hub dataset or a list of these")
    if any(not entry.path.strip() for entry in entries):
        raise UserError(f"{key} names an empty path; remove it or name a file")
    for entry in entries:
        if "\0" in entry.path:
            raise UserError(f"{key}={entry.path!r}: a path cannot contain a NUL character; remove it")
    return entries


def _place_of(text: str) -> str:
    """`local`, `remote` or `hub`; a path that exists on this machine is local, whatever it looks like."""
    if exists_here(text):
        return "local"
    if is_url(text):
        return "remote"
    is_local_pattern = has_pattern(text) and bool(glob.glob(str(local_path(text)), recursive=True))
    return "hub" if hub.is_hub_name(text) and not is_local_pattern else "local"


def _what(entry: FileEntry, key: str) -> str:
    return f"{key}={without_query(entry.path)}"


def _resolve(
    entry: FileEntry, place: int, role: Role, split: str | None, revision: str | None, what: str
) -> list[DataFile]:
    where = _place_of(entry.path)
    if where == "remote":
        return [
            DataFile(url, without_query(url), checked_kind(url.partition("::")[0], what=what), place, identity)
            for url, identity in expand_remote(entry, split, role, what)
        ]
    if where == "hub":
        return [
            DataFile(
                str(file.path), file.name, checked_kind(file.name, what=what), place, _identity(file),
                version_of(file.path),
            )
            for file in hub.download(entry, split, revision, role, what)
        ]  # fmt: skip
    paths = expand_local(entry, split, role, what)
    try:
        return [
            DataFile(
                str(path), str(path), checked_kind(path.name, what=what), place, identity_of(path), version_of(path)
            )
            for path in paths
        ]
    except OSError as error:
        raise UserError(f"{what}: cannot be opened ({one_line(error)}); check its permissions") from error


def _identity(file: hub.HubFile) -> str:
    return hashlib.sha256(f"{file.name}\0{file.commit}".encode()).hexdigest()
