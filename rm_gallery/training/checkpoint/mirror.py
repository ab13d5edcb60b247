"""A second place for finished checkpoints: any URL that fsspec knows."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError, one_line
from rm_gallery.training.checkpoint.folders import MARKER_NAME, STATE_NAME, hidden, list_checkpoints

log = logging.getLogger(__name__)

_MARKER = f"{STATE_NAME}/{MARKER_NAME}"


class Copies:
    """Copies checkpoints in the background, the marker last. A copy that fails is made with the next one; training
    goes on meanwhile. Held on rank 0.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError when the place cannot be reached."""
        self.url = url.rstrip("/")
        try:
            self._files, self._root = _open(self.url)
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # each kind of storage has errors of its own
            raise _unreachable(url, error) from error
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")
        self._last: Future[None] | None = None
        self._failed = False

    def add(self, run_dir: Path, then: Callable[[], None]) -> None:
        """Copy every checkpoint of the run that is not there yet; `then` is called afterwards, copied or not."""

        def work() -> None:
            self._copy_missing(run_dir)
            then()

        self._last = self._worker.submit(work)

    def close(self, run_dir: Path, *, hurry: bool = False) -> None:
        """Wait for what is under way, and try once more what failed. hurry: neither; the next start catches up."""
        if not hurry and self._last is not None:
            self._last.result()
            if self._failed:
                self.add(run_dir, lambda: None)
        self._worker.shutdown(wait=not hurry, cancel_futures=hurry)

    def _copy_missing(self, run_dir: Path) -> None:
        self._failed = False
        for folder in list_checkpoints(run_dir):
            try:
                if (folder / _MARKER).is_file() and not self._is_there(folder):
                    self._copy(folder)
                    log.info("copied %s to %s", folder.name, self.url)
            except Exception as error:
                self._failed = True
                log.warning("%s is not copied to %s yet: %s", folder.name, self.url, one_line(error))

    def _is_there(self, folder: Path) -> bool:
        marker = f"{self._root}/{folder.name}/{_MARKER}"
        return self._files.exists(marker) and self._files.cat_file(marker) == (folder / _MARKER).read_bytes()

    def _copy(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        if self._files.exists(f"{target}/{_MARKER}"):  # of an earlier course of the run
            self._files.rm_file(f"{target}/{_MARKER}")
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in sorted(names, key=lambda name: name == _MARKER):
            self._files.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(folder / name), f"{target}/{name}")
            size = self._files.info(f"{target}/{name}")["size"]
            if size != (folder / name).stat().st_size:
                raise OSError(f"{name} arrived with {size} bytes")


def newest_copy(url: str) -> str | None:
    """URL of the newest complete checkpoint below a URL, or None. Raises UserError when it cannot be reached."""
    try:
        files, root = _open(url)
        if not files.isdir(root):
            return None
        names = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
        steps = sorted((int(name[12:]) for name in names if re.fullmatch(r"global_step_\d+", name)), reverse=True)
        whole = (step for step in steps if files.exists(f"{root}/global_step_{step}/{_MARKER}"))
        step = next(whole, None)
    except Exception as error:
        raise _unreachable(url, error) from error
    return None if step is None else f"{url.rstrip('/')}/global_step_{step}"


def fetch(url: str, run_dir: Path) -> Path:
    """Download a checkpoint into the run folder; it is there as a whole or not at all.

    Raises UserError when it cannot be read or is no checkpoint with a training state.
    """
    name = url.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"global_step_\d+", name):
        raise UserError(f"{url}: not the name of a checkpoint; it ends with global_step_N")
    folder = run_dir / name
    staging = hidden(folder, "fetching")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        files, root = _open(url)
        if not files.exists(f"{root}/{_MARKER}"):
            raise UserError(f"{url}: holds no complete checkpoint ({_MARKER} is missing)")
        for path in files.find(root):
            relative = str(path)[len(str(root).rstrip("/")) + 1 :]
            (staging / relative).parent.mkdir(parents=True, exist_ok=True)
            files.get_file(path, str(staging / relative))
        os.replace(staging, folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url}: cannot be fetched into {run_dir} ({one_line(error)})") from error
    log.info("fetched %s", url)
    return folder


def _unreachable(url: str, error: Exception) -> UserError:
    return UserError(
        f"trainer.default_hdfs_dir={url}: cannot be reached ({one_line(error)}); mend that, or set it to null"
    )


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)
    return files, str(root).rstrip("/")
