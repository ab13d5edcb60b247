"""What sources hand on: files to read, chunks of them as they were read, and rows; and what the name of a file says."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

FileKind = Literal["parquet", "jsonl", "csv", "arrow"]

CHUNK_ROWS = 1024
CHUNK_BYTES = 8 << 20
"""A chunk ends at the row that reaches either of the two."""
LONGEST_ROW = 256 << 20
"""Bytes; a text file with a longer one lacks line ends or a quote, and reading on would fill the memory."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file to read."""

    path: str
    """Local path, or the fsspec URL to open."""
    name: str
    """What messages call it."""
    kind: FileKind
    entry: int
    """Which entry of the key it came from, from 0."""
    identity: str
    """Hash of what decides its content: size, time and both ends of a local file, commit or etag of a remote one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its columns by name, and where it stands."""

    values: dict[str, Any]
    file: str
    index: int
    """Number of the row in its file, from 0."""
    fault: str = ""
    """Why the row itself cannot be read (then `values` is empty); the same text for all rows with the same fault."""

    @property
    def where(self) -> str:
        """`file:row`, for messages."""
        return f"{self.file}:{self.index}"


@dataclass(frozen=True)
class Chunk(ABC):
    """Neighbouring rows of one file, not decoded yet, so that a worker process can do that. Can be pickled."""

    file: str
    first: int
    """Number of its first row in the file, from 0."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def skip(self, count: int) -> Chunk:
        """The chunk without its first `count` rows; at least one row must remain."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows in order; one that cannot be decoded carries its fault."""


KINDS: dict[str, FileKind] = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_KINDS = ("jsonl", "csv")  # the others have compression inside

KNOWN = "parquet, jsonl, ndjson, json, csv, tsv (the last five also with .gz or .zst), arrow, feather"

# Files that tools put beside the data; they hold no rows.
_NO_DATA = {
    "config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "metadata.json", "state.json",
}  # fmt: skip
LABELS: dict[FileKind, str] = {"parquet": "parquet", "jsonl": "JSON lines", "csv": "CSV", "arrow": "Arrow"}


def without_query(name: str) -> str:
    """A URL without `?...` and `#...`, which are no part of the file's name; anything else as it is."""
    return name.partition("?")[0].partition("#")[0] if urlsplit(name).scheme in ("http", "https") else name


def suffixes(name: str) -> tuple[str, str]:
    """Suffix of the kind and of the compression in lower case: `a.JSONL.gz` gives (.jsonl, .gz), `a.csv` (.csv, '')."""
    parts = [suffix.lower() for suffix in PurePosixPath(without_query(name)).suffixes]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    return parts[-1] if parts else "", compression


def kind_of(name: str) -> FileKind | None:
    """The kind of a file by its name, or None when it is not one that is read."""
    suffix, compression = suffixes(name)
    kind = KINDS.get(suffix)
    return None if compression and kind not in _COMPRESSED_KINDS else kind


def checked_kind(name: str, *, what: str) -> FileKind:
    """The kind of a file that was named; raises UserError for a name that tells none. `what` begins the sentence."""
    kind = kind_of(name)
    if kind is None:
        ending = "".join(suffixes(name))
        said = f"files that end in {ending} are not read" if ending else "the name does not tell what the file holds"
        raise UserError(f"{what}: {said}; rename or convert it so that it ends in one of {KNOWN}")
    return kind


def data_files(names: Iterable[str]) -> list[str]:
    """Those that are data, sorted; hidden files, files in hidden folders and files that describe data are none."""
    found = []
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if not hidden and kind_of(name) is not None and parts[-1].lower() not in _NO_DATA:
            found.append(name)
    return sorted(found)


def of_one_kind(names: Sequence[str], *, what: str, where: str) -> list[str]:
    """The names when all are of one kind; `.json` files beside another kind describe the data and are left out.

    what: begins the sentence; where: a place for a glob, as `folder/`.
    Raises UserError that names the kinds otherwise.
    """
    kinds = {kind_of(name) for name in names}
    plain_json = [name for name in names if suffixes(name) == (".json", "")]
    if len(kinds) > 1 and plain_json:
        names = [name for name in names if name not in plain_json]
        log.info("%s: %s left out, as files of another kind lie beside", what, ", ".join(plain_json[:3]))
        kinds = {kind_of(name) for name in names}
    if len(kinds) > 1:
        labels = " and ".join(sorted(LABELS[kind] for kind in kinds if kind))
        first = suffixes(sorted(names)[0])
        raise UserError(f"{what}: holds {labels} files; name one kind, as {where}*{''.join(first)}")
    return list(names)
