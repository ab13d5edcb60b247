"""The files of a model folder: whether they changed, a fingerprint of their content, and the checkpoints of a run."""

from __future__ import annotations

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from rm_gallery.data.sources.hub import check_model_name, go_offline_if_unreachable
from rm_gallery.errors import UserError
from rm_gallery.files import sha256_files
from rm_gallery.modeling.weight_files import read_adapter_files

log = logging.getLogger(__name__)

Stats: TypeAlias = dict[str, tuple[int, int]]
"""Size and modification time (ns) of each file by name."""

_CHECKPOINT = re.compile(r"(?:global_step_|checkpoint-)(\d+)")
# Of a trainer, not of the model: large, or written again while the model is in use.
_NOT_READ = re.compile(
    r"\..*|readme.*|licen[cs]e.*|optimizer.*|scheduler.*|rng_state.*|training_args\.bin|trainer_state\.json|.*\.log",
    re.IGNORECASE,
)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in the folder of a run; None if there is none."""
    found = [path.parent for path in folder.glob("*/config.json") if _CHECKPOINT.fullmatch(path.parent.name)]
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.name)), default=None)


def choose_checkpoint(model: str, *, key: str) -> str:
    """The model folder that an option names: in the folder of a run its best checkpoint, else its newest complete one.

    The choice is logged; any other folder and the name of a hub model stay as they are. Raises UserError for a path
    that does not exist, a hub model that is neither cached nor can be downloaded, and a run without a checkpoint.
    """
    check_model_name(model, key=key)
    folder = Path(model).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return model
    newest = newest_checkpoint(folder)
    if newest is not None and newest.name.startswith("checkpoint-"):  # of another trainer
        log.info("%s: the folder of a run; using %s, its newest checkpoint", model, newest)
        return str(newest)
    if newest is None and not (folder / "run.json").is_file():
        return model  # no run: reported when it is loaded

    from rm_gallery.training.checkpoint.folders import best_checkpoint, complete_checkpoints

    best = best_checkpoint(folder)
    if best is not None:
        log.info("%s: the folder of a run; using %s, its best checkpoint (best.json)", model, best)
        return str(best)
    complete = complete_checkpoints(folder)
    if not complete:
        which = f" ({newest.name} has no manifest; name it to use it anyway)" if newest is not None else ""
        raise UserError(f"{key}={model}: the folder of a run without a complete checkpoint{which}; give a model folder")
    log.info("%s: the folder of a run; using %s, its newest checkpoint", model, complete[-1])
    return str(complete[-1])


def stats_of(folder: str | Path) -> Stats:
    """The files of a model folder at this moment; {} for anything but a folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return {}
    found = [each for each in [*path.iterdir(), *path.glob("additional_chat_templates/*")] if each.is_file()]
    read = sorted(each for each in found if not _NOT_READ.fullmatch(each.name))
    return {str(each.relative_to(path)): (each.stat().st_size, each.stat().st_mtime_ns) for each in read}


class ModelFolder:
    """The files of one model while it scores."""

    def __init__(self, model: str, base: str | None = None, *, quantized: bool = True) -> None:
        """model: a folder, or a model of the hub. base: of an adapter, if its folder does not name it. quantized: see
        `load_folder`.
        """
        self.model, self._quantized = model, quantized
        adapter = read_adapter_files(model, key="model")
        self._base = None if adapter is None or not (base or adapter.base) else ModelFolder(base or adapter.base)
        self._stats = self._now()

    @cached_property
    def fingerprint(self) -> list[Any]:
        """The content of every file of the folder, or the commit of a hub model."""
        folder = Path(self.model).expanduser()
        if self._base is not None:
            files = [[name, digest] for name, digest in self._hash(folder).items()]
            return [*files, self._base.fingerprint, *([] if self._quantized else ["unquantized"])]
        if folder.is_dir():
            return [[name, digest] for name, digest in self._hash(folder).items()]
        config = file_of(self.model, "config.json")
        return [self.model, "" if config is None else config.parent.name]  # the commit

    def check_unchanged(self) -> None:
        """Raise UserError if the content of a file is another than when `fingerprint` was computed."""
        if self._base is not None:
            self._base.check_unchanged()
        now, before = self._now(), self.fingerprint
        if now == self._stats:
            return
        del self.fingerprint
        if self.fingerprint != before:
            raise UserError(f"model={self.model}: the folder changed while it was used; rerun the command")
        self._stats = now

    def _hash(self, folder: Path) -> dict[str, str]:
        try:
            return sha256_files(folder, stats_of(folder))
        except OSError as error:
            raise UserError(f"model={self.model}: {error.filename or 'a file'} cannot be read ({error})") from error

    def _now(self) -> list[Any]:
        """Like `stats_of`, with the times that a program cannot set."""
        folder = Path(self.model).expanduser()
        changes = [((folder / name).stat().st_ino, (folder / name).stat().st_ctime_ns) for name in stats_of(folder)]
        return [stats_of(folder), changes]


class ServedModel:
    """A model behind a server, in the place of a `ModelFolder`. What the server loads cannot be seen from here."""

    def __init__(self, model: str, tokenizer: str | None) -> None:
        """model: see `open_servers`. tokenizer: folder or hub name of the served model."""
        self.model, self._tokenizer = model, None if tokenizer is None else ModelFolder(tokenizer)

    @cached_property
    def fingerprint(self) -> list[Any]:
        """The text that names the servers, and the content of the tokenizer's folder."""
        return ["server", self.model, None if self._tokenizer is None else self._tokenizer.fingerprint]

    def check_unchanged(self) -> None:
        """See `ModelFolder.check_unchanged`."""
        if self._tokenizer is not None:
            self._tokenizer.check_unchanged()


class GivenRewards:
    """Rewards that the input has, in the place of a `ModelFolder`."""

    def __init__(self, column: str) -> None:
        """column: of the input; that of pairs is `COLUMN_chosen` and `COLUMN_rejected`, as `score` writes them."""
        self.model = column
        self.fingerprint: list[Any] = ["rewards", column]

    def check_unchanged(self) -> None:
        """See `ModelFolder.check_unchanged`: rows are compared when they are written."""


def file_of(model: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub model in the local cache, downloaded if necessary; None if it has none."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    go_offline_if_unreachable()
    try:
        found = cached_file(model, name)
    except Exception:  # what is needed is reported when the model is loaded
        return None
    return None if found is None else Path(found)
