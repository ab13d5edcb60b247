"""Files behind URLs, through fsspec: what a URL names, and a file object that survives a connection that breaks off."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from rm_gallery.data.source.config import FileEntry, Role, refuse_keys
from rm_gallery.data.source.hub_errors import endpoint, hub_sentence
from rm_gallery.data.source.local import LOCAL_SCHEMES
from rm_gallery.data.source.names import checked_kind, data_files, of_one_kind, without_query
from rm_gallery.data.source.reasons import reason_of
from rm_gallery.data.source.splits import choose_split, splits_by_name
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try when a connection broke off."""
_BLOCK = 4 << 20
_END_BYTES = 64 << 10
_PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
_IN_EXTRA = ("aiohttp", "s3fs")
# What file systems tell of a file that changes when its content does.
_MARKS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "content_settings", "blob_id", "sha256", "checksum", "crc32c",
    "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip


def is_url(text: str) -> bool:
    """Whether a text is a URL to open through fsspec, not one of a local file."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme not in LOCAL_SCHEMES


def expand_remote(entry: FileEntry, split: str | None, role: Role, what: str) -> list[tuple[str, str]]:
    """(URL, identity) of the data files that a URL, a URL of a folder or one with a glob names, in order.

    split: the split wanted of a folder with several, or None for the one that fits `role`.
    what: begins each sentence. Raises UserError for what cannot be reached or holds no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    fs, path = _file_system(entry.path, what)
    with _failing(entry.path, what, "looked up"):
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


def _file_system(url: str, what: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path that it knows the file by."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0].rpartition("::")[2]
    # The hub's file system would take the endpoint that was set when it was imported.
    options = {"endpoint": endpoint()} if scheme == "hf" and endpoint() else {}
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        if package is None:
            raise UserError(f"{what}: {scheme}:// needs a package that is missing ({reason_of(error)})") from error
        install = "'rm-gallery[remote]'" if package in _IN_EXTRA else package
        raise UserError(f"{what}: {scheme}:// needs the package {package}; run pip install {install}") from error
    except ValueError as error:
        raise UserError(f"{what}: {scheme}:// cannot be opened ({reason_of(error)}); check the URL") from error
    return fs, str(path)


@contextmanager
def _failing(url: str, what: str, doing: str) -> Iterator[None]:
    """Turn whatever a file system raises into a sentence: each one has errors of its own, with no common base."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.__cause__ is None:
            raise UserError(f"{what}: no such file; check the URL") from error
        if url.startswith("hf://"):
            repo = "/".join(url.split("/")[3:5]).partition("@")[0]
            raise UserError(f"{what}: {hub_sentence(error, repo, url)}") from error
        reason = reason_of(error.__cause__ or error).replace(url, file_name(url))
        raise UserError(f"{what}: cannot be {doing} ({reason}); check the URL, the network and your rights") from error


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


def open_remote(url: str) -> IO[bytes]:
    """The file behind a URL, which can seek; goes on by itself where a connection broke off.

    A server that sends no parts of a file has it copied to a temporary file first.
    Reading raises UserError when it stays broken off.
    """
    fs, path = _file_system(url, url)
    with _failing(url, url, "opened"):
        info = fs.info(path)
    has_parts = not url.startswith(("http://", "https://")) or bool(info.get("partial"))
    if has_parts and info.get("size") is not None:
        return io.BufferedReader(_RemoteFile(fs, path, url, info["size"]), _BLOCK)
    return _copy(fs, path, url)


def _copy(fs: Any, path: str, url: str) -> IO[bytes]:
    """The whole file in a temporary file that goes with its file object."""
    for wait in (*_WAITS, None):
        try:
            with ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile())
                with fs.open(path, "rb", block_size=0) as stream:
                    while part := stream.read(_BLOCK):
                        file.write(part)
                file.seek(0)
                stack.pop_all()
                return file
        except Exception as error:  # each file system has errors of its own
            _wait_or_give_up(wait, url, error)
    raise AssertionError("the last try returns or raises")


def file_name(url: str) -> str:
    """A URL as messages call it: without its query, which may hold a key."""
    return without_query(url)


def _wait_or_give_up(wait: float | None, url: str, error: Exception) -> None:
    name = file_name(url)
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    is_refused = isinstance(error, FileNotFoundError | PermissionError) or (status is not None and status < 500)
    if wait is None or is_refused:
        with _failing(url, name, "read" if is_refused else "read on: the connection broke off"):
            raise error
    log.warning("%s: the connection broke off (%s); trying again", name, reason_of(error))
    time.sleep(wait)


class _RemoteFile(io.RawIOBase):
    """A remote file of known size that opens itself again where reading failed."""

    def __init__(self, fs: Any, path: str, url: str, size: int) -> None:
        self._fs, self._path, self._url, self._size = fs, path, url, size
        self._place = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        for wait in (*_WAITS, None):
            try:
                data = self._read(wanted)
                buffer[: len(data)] = data
                self._place += len(data)
                return len(data)
            except Exception as error:  # each file system has errors of its own
                self._close_file()
                _wait_or_give_up(wait, self._url, error)
        raise AssertionError("the last try returns or raises")

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._fs.open(self._path, "rb", block_size=_BLOCK, cache_type="none")
        if self._file.tell() != self._place:
            self._file.seek(self._place)
        data: bytes = self._file.read(size)
        if not data:
            raise OSError(f"ended after {self._place} of {self._size} bytes")
        return data

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close_file()
        super().close()
