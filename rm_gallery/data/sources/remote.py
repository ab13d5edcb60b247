"""URLs: expanding folders and globs, the identity of a file, and opening it through fsspec.

Reading resumes after dropped connections.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, TypeVar

from rm_gallery.data.sources.config import FileEntry, Role, refuse_keys
from rm_gallery.data.sources.hub import endpoint, hub_message, retry
from rm_gallery.data.sources.local import LOCAL_SCHEMES
from rm_gallery.data.sources.records import checked_kind, data_files, of_one_kind, without_query
from rm_gallery.data.sources.splits import choose_split, report_choice, splits_by_name
from rm_gallery.errors import UserError, one_line
from rm_gallery.safe_text import redact_urls, scrub

_END_BYTES = 64 << 10
# Fields of file systems that change with the content of a file.
_MARKS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "content_settings", "blob_id", "sha256", "checksum", "crc32c",
    "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip


def expand_remote(entry: FileEntry, split: str | None, role: Role, what: str) -> list[tuple[str, str]]:
    """(URL, identity) of the data files that a URL, a URL of a folder or one with a glob names, in order.

    split: the split of a folder with several, or None for the default of `role`.
    what: start of messages. Raises UserError for a URL that cannot be reached or has no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    fs, path = file_system(entry.path, what)
    with failing(entry.path, what, "looked up"):
        return _tried(entry.path, lambda: _look_up(fs, path, entry, split, role, what))


def _look_up(fs: Any, path: str, entry: FileEntry, split: str | None, role: Role, what: str) -> list[tuple[str, str]]:
    if "::" in entry.path or not _names_several(fs, entry.path, path):
        refuse_keys(entry, what, "split")
        checked_kind(entry.path.partition("::")[0], what=what)
        return [(entry.path, _identity(fs, entry.path, path))]
    is_pattern = _has_pattern(entry.path)
    if is_pattern:
        refuse_keys(entry, what, "split")
    start = path.rstrip("/") + "/"
    found = data_files(fs.glob(path) if is_pattern else [name.removeprefix(start) for name in fs.find(path)])
    if not found:
        raise UserError(f"{what}: no data file there; name a file, a folder or a pattern that holds some")
    if not is_pattern:
        by_split = splits_by_name(found)
        if split is not None or (len(by_split) > 1 and role != "all"):
            chosen = choose_split(by_split, split, role, what)
            report_choice(chosen, found, split, what)
            found = chosen
        found = [start + name for name in found]
    chosen = of_one_kind(found, what=what, where=entry.path.rpartition("/")[0] + "/")
    return [(url, _identity(fs, url, name)) for name in chosen for url in [fs.unstrip_protocol(name)]]


def _has_pattern(url: str) -> bool:
    return any(mark in url for mark in "*[")  # not the question mark, which starts the query


def _names_several(fs: Any, url: str, path: str) -> bool:
    if _has_pattern(url):
        return True
    if url.startswith(("http://", "https://")):
        return url.endswith("/")  # every page is also a file
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


_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry."""
_BLOCK = 4 << 20
_PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
_IN_EXTRA = ("aiohttp", "s3fs")
_Result = TypeVar("_Result")


def is_url(text: str) -> bool:
    """Whether a text is a URL to open through fsspec, not that of a local file."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme not in LOCAL_SCHEMES


def file_system(url: str, what: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the file in it."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0].rpartition("::")[2]
    # Otherwise the file system of the hub uses the endpoint of the time when it was imported.
    options = {"endpoint": endpoint()} if scheme == "hf" and endpoint() else {}
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        if package is None:
            raise UserError(f"{what}: {scheme}:// needs a package that is not installed ({one_line(error)})") from error
        install = "'rm-gallery[remote]'" if package in _IN_EXTRA else package
        raise UserError(f"{what}: {scheme}:// needs the package {package}; run pip install {install}") from error
    except ValueError as error:
        raise UserError(f"{what}: {scheme}:// cannot be opened ({one_line(error)}); check the URL") from scrub(error)
    except Exception as error:  # a chained URL is looked up at once, and file systems have their own errors
        raise UserError(
            f"{what}: cannot be looked up ({one_line(scrub(error))}); check the URL, the network and permissions"
        ) from error
    return fs, str(path)


@contextmanager
def failing(url: str, what: str, doing: str) -> Iterator[None]:
    """Turn any error of a file system into a UserError: their errors have no common base."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        scrub(error)
        if isinstance(error, FileNotFoundError) and error.__cause__ is None:
            raise UserError(f"{what}: no such file; check the URL") from error
        if url.startswith("hf://"):
            repo = "/".join(url.split("/")[3:5]).partition("@")[0]
            raise UserError(f"{what}: {hub_message(error, repo, url)}") from error
        reason = one_line(error.__cause__ or error).replace(redact_urls(url), without_query(url))
        raise UserError(f"{what}: cannot be {doing} ({reason}); check the URL, the network and permissions") from error


def _tried(url: str, call: Callable[[], _Result]) -> _Result:
    """Result of the call, retried after transient errors."""
    return retry(without_query(url), call, waits=_WAITS, is_transient=lambda error: not _is_final(error))


def _is_final(error: Exception) -> bool:
    """Whether a retry cannot help: the file does not exist, or access is denied."""
    if isinstance(error, UserError | PermissionError | IsADirectoryError):
        return True
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return True
    for each in (error, error.__cause__):
        status = getattr(each, "status", None) or getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status < 500 and status not in (408, 429)
    return False


def open_remote(url: str) -> IO[bytes]:
    """The file of a URL; seekable. Reading resumes after a dropped connection, and raises UserError after five tries.

    From a server without range requests, the file is first copied to a temporary file.
    """
    name = without_query(url)
    fs, path = file_system(url, name)
    with failing(url, name, "opened"):
        info = _tried(url, lambda: fs.info(path))
    has_parts = not url.startswith(("http://", "https://")) or bool(info.get("partial"))
    if has_parts and info.get("size") is not None:
        return io.BufferedReader(_RemoteFile(fs, path, url, info["size"]), _BLOCK)
    return _copy(fs, path, url)


def _copy(fs: Any, path: str, url: str) -> IO[bytes]:
    """A temporary copy of the file, deleted when it is closed."""
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())

        def copy() -> None:
            file.seek(0)
            file.truncate()
            with fs.open(path, "rb", block_size=0) as stream:
                while part := stream.read(_BLOCK):
                    file.write(part)

        with failing(url, without_query(url), "read further"):
            _tried(url, copy)
        file.seek(0)
        stack.pop_all()
        return file


class _RemoteFile(io.RawIOBase):
    """A remote file of known size that reopens itself where reading failed."""

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
        with failing(self._url, without_query(self._url), "read further"):
            data = _tried(self._url, lambda: self._read(wanted))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._fs.open(self._path, "rb", block_size=_BLOCK, cache_type="none")
            if self._file.tell() != self._place:
                self._file.seek(self._place)
            data: bytes = self._file.read(size)
            if not data:
                raise OSError(f"ended after {self._place} of {self._size} bytes")
            return data
        except Exception:
            self._close_file()  # the retry reopens it
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close_file()
        super().close()
