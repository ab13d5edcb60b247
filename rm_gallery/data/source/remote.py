"""URLs: which files a URL, a folder behind one or a glob names, and what identifies them."""

from __future__ import annotations

import hashlib
from typing import Any

from rm_gallery.data.source.config import FileEntry, Role, refuse_keys
from rm_gallery.data.source.names import checked_kind, data_files, of_one_kind
from rm_gallery.data.source.remote_file import failing, file_system, open_remote, tried
from rm_gallery.data.source.splits import choose_split, splits_by_name
from rm_gallery.errors import UserError

_END_BYTES = 64 << 10
# What file systems tell of a file that changes when its content does.
_MARKS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "content_settings", "blob_id", "sha256", "checksum", "crc32c",
    "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip


def expand_remote(entry: FileEntry, split: str | None, role: Role, what: str) -> list[tuple[str, str]]:
    """(URL, identity) of the data files that a URL, a URL of a folder or one with a glob names, in order.

    split: the split wanted of a folder with several, or None for the one that fits `role`.
    what: begins each sentence. Raises UserError for what cannot be reached or holds no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    fs, path = file_system(entry.path, what)
    with failing(entry.path, what, "looked up"):
        return tried(entry.path, lambda: _looked_up(fs, path, entry, split, role, what))


def _looked_up(fs: Any, path: str, entry: FileEntry, split: str | None, role: Role, what: str) -> list[tuple[str, str]]:
    if "::" in entry.path or not _names_several(fs, entry.path, path):
        refuse_keys(entry, what, "split")
        checked_kind(entry.path.partition("::")[0], what=what)
        return [(entry.path, _identity(fs, entry.path, path))]
    is_pattern = _has_pattern(entry.path)
    if is_pattern:
        refuse_keys(entry, what, "split")
    found = data_files(fs.glob(path) if is_pattern else _relative(fs.find(path), path))
    if not found:
        raise UserError(f"{what}: no data file there; name a file, a folder or a pattern that holds some")
    if not is_pattern:
        by_split = splits_by_name(found)
        if split is not None or len(by_split) > 1:
            found = choose_split(by_split, split, role, what)
        found = [f"{path.rstrip('/')}/{name}" for name in found]
    chosen = of_one_kind(found, what=what, where=entry.path.rpartition("/")[0] + "/")
    return [(url, _identity(fs, url, name)) for name in chosen for url in [fs.unstrip_protocol(name)]]


def _relative(names: list[str], folder: str) -> list[str]:
    return [name.removeprefix(folder.rstrip("/") + "/") for name in names]


def _has_pattern(url: str) -> bool:
    return any(mark in url for mark in "*[")  # not the question mark, which begins the query of a URL


def _names_several(fs: Any, url: str, path: str) -> bool:
    if _has_pattern(url):
        return True
    if url.startswith(("http://", "https://")):
        return url.endswith("/")  # every page is a file too
    return bool(fs.isdir(path))


def _identity(fs: Any, url: str, path: str) -> str:
    info = fs.info(path)
    marks = {name: str(info[name]) for name in _MARKS if info.get(name)}
    digest = hashlib.sha256(repr((url, info.get("size"), marks)).encode(errors="surrogateescape"))
    if not marks and info.get("size"):
        with open_remote(url) as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, info["size"] - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()
