"""Keys of `data` that name the files: `train_files`, `val_files` and their splits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge

from rm_gallery.data.sources.records import MAX_ROW_BYTES
from rm_gallery.errors import UserError, nearest

Role = Literal["train", "val", "all"]
"""Which split to use of a folder or dataset with several when none is named: `all` takes every split."""


@dataclass(frozen=True)
class FileEntry:
    """One entry of `train_files` or `val_files`; a plain path is an entry with only that path."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str = ""
    """File, folder, glob, URL, or dataset of the Hugging Face hub."""
    weight: float = 1.0
    """How often a pair is used per epoch: 2 means twice, 0.5 a different half each epoch."""
    split: str | None = None
    """Split of a hub dataset or of a folder with several; default: `data.train_split` or `data.val_split`."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; default: `data.revision`."""
    name: str | None = None
    """Its name in metrics by source."""
    format: str | None = None
    """Format of its rows, instead of `data.format`."""


Files = str | FileEntry | tuple[str | FileEntry, ...]


@dataclass(frozen=True)
class SourceConfig:
    """Part of `data`: the files of training and validation data."""

    __pydantic_config__ = {"extra": "forbid"}

    train_files: Files = ""
    """File (parquet, JSON lines, CSV, Arrow), folder, glob, URL, hub dataset (`org/name` or `org/name/train.parquet`),
    or a list of these; an entry may be a section of keys: `{path: org/name, split: train, weight: 0.5}`."""
    val_files: Files = ""
    """The same for validation; empty for none."""
    val_fraction: float = 0.0
    """Share of the training prompts to hold out for validation if `val_files` is empty, from 0 to below 1."""
    train_split: str | None = None
    """Split of entries of `train_files` that name none; default: `train` if there are several."""
    val_split: str | None = None
    """The same for `val_files`; default: `validation`, else `test`."""
    revision: str | None = None
    """Branch, tag or commit of hub datasets for entries that name none; default: the newest state."""
    max_row_bytes: Annotated[int, Ge(1)] = MAX_ROW_BYTES
    """A larger row is dropped and counted while it is read, before it fills memory: bytes of its line in JSON lines and
    CSV, of its values in parquet and Arrow."""


EVAL_SETS = "trainer.eval_sets"
"""Key of further sets to validate on; `trainer.eval_sets.NAME` is read as `data.val_files`."""


def role_of(key: str) -> Role:
    """Whether a key such as `data.val_files` names data for training or for validation."""
    return "val" if key.endswith("val_files") or key.startswith(EVAL_SETS) else "train"


def entries_of(config: SourceConfig, key: str) -> tuple[FileEntry, ...]:
    """The entries of `data.train_files` or `data.val_files`, which `DataFile.entry` counts."""
    return as_entries(config.val_files if role_of(key) == "val" else config.train_files)


def as_entries(files: Files | Sequence[str | FileEntry]) -> tuple[FileEntry, ...]:
    """A path, an entry or several of them as entries; an empty path alone is none."""
    if isinstance(files, str):
        return (FileEntry(files),) if files else ()
    if isinstance(files, FileEntry):
        return (files,)
    return tuple(FileEntry(each) if isinstance(each, str) else each for each in files)


def entry_problems(value: Any, key: str) -> list[str]:
    """Problems of the plain value, of any type, of a key such as `data.train_files`."""
    if value is None or isinstance(value, str | FileEntry):
        return []
    if isinstance(value, Mapping):
        return _section_problems(value, key)
    if not isinstance(value, list | tuple):
        return [f"{key}={value!r}: must be a path, a list of paths, or entries such as {{path: a.parquet, weight: 2}}"]
    problems = []
    for place, each in enumerate(value):
        if isinstance(each, Mapping):
            problems += _section_problems(each, f"{key}[{place}]")
        elif not isinstance(each, str | FileEntry):
            problems.append(f"{key}[{place}]={each!r}: must be a path or an entry such as {{path: a.parquet}}")
    return problems


def _section_problems(section: Mapping[Any, Any], key: str) -> list[str]:
    known = [field.name for field in fields(FileEntry)]
    problems = [
        f"{key}.{name}: unknown key.{nearest(str(name), known)} Known are {', '.join(known)}"
        for name in section
        if name not in known
    ]
    if not isinstance(section.get("path"), str) or not section["path"].strip():
        problems.append(f"{key}: an entry needs its path, e.g. {{path: a.parquet, weight: 2}}")
    for name in known[2:]:
        if not isinstance(section.get(name), str | None):
            problems.append(f"{key}.{name}={section[name]!r}: must be a string; put quotes around it")
    weight = section.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight <= 0:
        problems.append(f"{key}.weight={weight!r}: must be a number above 0; remove the entry to use none of it")
    return problems


def refuse_keys(entry: FileEntry, what: str, *names: str) -> None:
    """Raise UserError for the first of these keys that the entry sets although it does not apply to its path."""
    for name in names:
        if getattr(entry, name) is not None:
            raise UserError(f"{what}: {name} does not apply to such a path; remove it from the entry")


def check_val_fraction(config: SourceConfig) -> None:
    """Raise UserError for a share out of range, or together with validation files."""
    share = config.val_fraction
    if not 0 <= share < 1:
        raise UserError(f"data.val_fraction={share}: must be at least 0 and below 1")
    if share and config.val_files:
        raise UserError(
            f"data.val_fraction={share} with data.val_files: set one of the two (data.val_files= names no files)"
        )
