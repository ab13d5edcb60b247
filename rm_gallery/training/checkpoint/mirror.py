"""Mirror of finished checkpoints: uploads to, and downloads from, any URL that fsspec supports."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError, one_line
from rm_gallery.files import MANIFEST
from rm_gallery.safe_text import scrub
from rm_gallery.training.checkpoint.folders import (
    EARLIER_MANIFEST,
    files_of,
    hidden,
    is_resumable,
    list_checkpoints,
    manifest_of,
)

log = logging.getLogger(__name__)


class Mirror:
    """Uploads checkpoints in the background, the manifest last. A failed upload is retried with the next checkpoint.

    Held by rank 0.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError when the URL cannot be reached."""
        self.url = url.rstrip("/")
        try:
            self._files, self._root = _open(self.url)
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # each storage backend raises its own errors
            raise _unreachable(url, error) from error
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._last: Future[None] | None = None
        self._failed = False

    def add(self, run_dir: Path, then: Callable[[], None]) -> None:
        """Upload every checkpoint of the run that is missing, then call `then`, even after a failure."""

        def work() -> None:
            self._upload_missing(run_dir)
            then()

        self._last = self._worker.submit(work)

    def close(self, run_dir: Path, *, wait: bool = True) -> None:
        """Wait for uploads and retry failed ones once. wait=False does neither; the next start catches up."""
        if wait and self._last is not None:
            self._last.result()
            if self._failed:
                self.add(run_dir, lambda: None)
        self._worker.shutdown(wait=wait, cancel_futures=not wait)

    def _upload_missing(self, run_dir: Path) -> None:
        self._failed = False
        for folder in list_checkpoints(run_dir):
            try:
                if is_resumable(folder) and not self._is_uploaded(folder):
                    self._upload(folder)
                    log.info("copied %s to %s", folder.name, self.url)
            except Exception as error:
                self._failed = True
                log.warning("%s is not copied to %s yet: %s", folder.name, self.url, one_line(error))

    def _is_uploaded(self, folder: Path) -> bool:
        name = manifest_of(folder)
        manifest = f"{self._root}/{folder.name}/{name}"
        return self._files.exists(manifest) and self._files.cat_file(manifest) == (folder / name).read_bytes()

    def _upload(self, folder: Path) -> None:
        target, manifest = f"{self._root}/{folder.name}", manifest_of(folder)
        for name in (MANIFEST, EARLIER_MANIFEST):  # of an earlier upload: the checkpoint is incomplete from here on
            if self._files.exists(f"{target}/{name}"):
                self._files.rm_file(f"{target}/{name}")
        for name in sorted(files_of(folder), key=lambda name: name == manifest):
            self._files.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(folder / name), f"{target}/{name}")
            size = self._files.info(f"{target}/{name}")["size"]
            if size != (folder / name).stat().st_size:
                raise OSError(f"{name} arrived with {size} bytes")


def newest_upload(url: str) -> str | None:
    """URL of the newest complete checkpoint below a URL, or None. Raises UserError when it cannot be reached."""
    try:
        files, root = _open(url)
        if not files.isdir(root):
            return None
        names = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
        steps = sorted((int(name[12:]) for name in names if re.fullmatch(r"global_step_\d+", name)), reverse=True)
        complete = (step for step in steps if _is_complete(files, f"{root}/global_step_{step}"))
        step = next(complete, None)
    except Exception as error:
        raise _unreachable(url, error) from error
    return None if step is None else f"{url.rstrip('/')}/global_step_{step}"


def download(url: str, run_dir: Path) -> Path:
    """Download a checkpoint into the run directory, under a hidden name until all files are there.

    Raises UserError when it cannot be read or is not a complete checkpoint.
    """
    name = url.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"global_step_\d+", name):
        raise UserError(f"{url}: not the name of a checkpoint; it ends with global_step_N")
    folder = run_dir / name
    staging = hidden(folder, "downloading")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        files, root = _open(url)
        if not _is_complete(files, root):
            raise UserError(f"{url}: has no complete checkpoint ({MANIFEST} or training_state is missing)")
        staging.mkdir(parents=True)
        for name in (MANIFEST, EARLIER_MANIFEST):
            if files.exists(f"{root}/{name}"):
                _get(files, root, name, staging)
        for name in files_of(staging):  # only names inside of the folder, whatever the server has
            if not (staging / name).exists():
                _get(files, root, name, staging)
        os.replace(staging, folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url}: cannot be downloaded into {run_dir} ({one_line(error)})") from scrub(error)
    log.info("downloaded %s", url)
    return folder


def _get(files: Any, root: str, name: str, staging: Path) -> None:
    (staging / name).parent.mkdir(parents=True, exist_ok=True)
    files.get_file(f"{root}/{name}", str(staging / name))


def _is_complete(files: Any, folder: str) -> bool:
    """Whether the manifest, which is uploaded last, exists; a manifest.json without a format does not count."""
    if files.exists(f"{folder}/{EARLIER_MANIFEST}"):
        return True
    manifest = f"{folder}/{MANIFEST}"
    return files.exists(manifest) and "format" in json.loads(files.cat_file(manifest))


def _unreachable(url: str, error: Exception) -> UserError:
    scrub(error)
    return UserError(
        f"trainer.default_hdfs_dir={url}: cannot be reached ({one_line(error)}); fix that, or set it to null"
    )


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)
    return files, str(root).rstrip("/")
