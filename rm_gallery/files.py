"""Files: atomic writes, locks, SHA-256 and the manifest of a folder."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_HASH_THREADS = 4
_LOST_DATA = {errno.EIO, errno.ENOSPC, errno.EDQUOT}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: Path, *, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to; it replaces `path` when the block ends.

    When the block raises, the temporary file is removed and `path` keeps its old content.
    temporary: another name on the same file system; by default a hidden name in the same folder.
    """
    temporary = temporary_path(path) if temporary is None else temporary
    try:
        yield temporary
        replace(temporary, path)
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_path(path: Path) -> Path:
    """Hidden name of this process, in the folder of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace(temporary: Path, path: Path) -> None:
    """Flush a finished file or folder to disk and rename it to `path`, which is replaced if it exists."""
    for each in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
        sync(each)
    if temporary.is_dir() and path.exists():
        remove(path)
    os.replace(temporary, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists. A folder is renamed first, so that it never exists in part.

    Raises OSError when the file, or the name of the folder, cannot be removed.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.deleting")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync).

    Raises OSError when data were lost: I/O error, full disk, quota. File systems without fsync are accepted.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _LOST_DATA:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, *, timeout: float = -1, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`. The system releases it when the process ends, even if killed.

    timeout: seconds to wait for another holder; negative waits without limit. on_wait: called once, with a
    description of the holder, before waiting. Where the file system has no locks the block runs without one.
    Raises TimeoutError, whose message describes the holder, and OSError when the lock file cannot be created.
    """
    from filelock import FileLock, Timeout

    # Recent versions fall back to a soft lock, which would outlive a killed process.
    options: dict[str, Any] = {"fallback_to_soft": False}
    if "fallback_to_soft" not in inspect.signature(FileLock.__init__).parameters:
        options = {}
    held = FileLock(path, thread_local=False, **options)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            holder = _holder(path)
            if timeout and on_wait is not None:
                on_wait(holder)
            try:
                held.acquire(timeout=timeout, poll_interval=0.2)
            except Timeout:
                raise TimeoutError(holder) from None
        path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            held.release()
            raise
        log.warning(
            "%s: the file system has no locks (%s); make sure that no other process writes the same files",
            path, getattr(error, "strerror", None) or error,
        )  # fmt: skip
    try:
        yield
    finally:
        held.release()


def _holder(path: Path) -> str:
    """What the holder of a lock file has written to it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file name, relative to the folder; a few files at a time."""
    names = list(names)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


MANIFEST = "manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write `manifest.json`: the SHA-256 of each file by its name relative to the folder."""
    content = {"format": _FORMAT, "sha256": dict(sorted(hashes.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def renew_in_manifests(path: Path) -> None:
    """Renew the hash of a file that was changed on purpose in the manifests of its folder and of the one above.

    A manifest that does not list the file stays as it is. One that lists the manifest below, as that of a checkpoint
    with an average of its weights does, is renewed with it.
    """
    changed = [path.resolve()]
    for folder in list(changed[0].parents)[:2]:
        try:
            version, hashes = _read_manifest((folder / MANIFEST).read_bytes())
        except (OSError, ValueError):
            continue
        names = [each.relative_to(folder).as_posix() for each in changed]
        found = [name for name in names if name in hashes]
        if found and version == _FORMAT:
            content = {"format": _FORMAT, "sha256": {**hashes, **sha256_files(folder, found)}}
            write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
            changed.append(folder / MANIFEST)


def manifest_names(content: bytes) -> list[str]:
    """Names of the files in a manifest. Raises ValueError for any other content, or a name outside its folder."""
    return sorted(_read_manifest(content)[1])


def _read_manifest(content: bytes) -> tuple[Any, dict[str, Any]]:
    """(format, hash by file name) of a manifest."""
    try:
        values = json.loads(content)
        version, hashes = values["format"], values["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("cannot be read") from error
    if not isinstance(hashes, dict):
        raise ValueError("cannot be read")
    for name in hashes:
        if not is_inside(name):
            raise ValueError(f"lists {name!r}, which is not a file of this folder")
    return version, hashes


def is_inside(name: str) -> bool:
    """Whether a relative file name stays inside its folder, on every system."""
    parts = re.split(r"[/\\]", name)
    return not any(part in ("", ".", "..") or ":" in part or "\0" in part for part in parts)


def check_manifest(folder: Path, *, manifest: str = MANIFEST, part: int = 0, parts: int = 1) -> str | None:
    """Compare the files of a folder with its manifest; describe the first fault, or return None when there is none.

    part, parts: check every `parts`-th file only, starting at `part`, so that ranks can share the reading.
    """
    name = manifest.rpartition("/")[2]
    try:
        version, hashes = _read_manifest((folder / manifest).read_bytes())
    except OSError:
        return f"{name} cannot be read"
    except ValueError as error:
        return f"{name} {error}"
    names = sorted(hashes)[part::parts]
    if version != _FORMAT:
        return f"written in format {version!r}, which this version does not read"
    try:
        missing = [each for each in names if not (folder / each).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        found = sha256_files(folder, names)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    differing = [each for each in names if found[each] != hashes[each]]
    return f"{differing[0]} is not what was written" if differing else None
