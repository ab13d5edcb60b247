"""The records of a source: files to read, chunks of undecoded rows, and rows; and what a file name implies."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from rm_gallery.errors import UserError
from rm_gallery.safe_text import redact_urls

log = logging.getLogger(__name__)

FileKind = Literal["parquet", "jsonl", "csv", "arrow"]

CHUNK_ROWS = 1024
CHUNK_BYTES = 8 << 20
"""A chunk ends at the row that reaches either limit."""
MAX_ROW_BYTES = 16 << 20
"""Default of `data.max_row_bytes`: about four million tokens."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file to read."""

    path: str
    """Local path, or the fsspec URL to open."""
    name: str
    """Its name in messages."""
    kind: FileKind
    entry: int
    """Number of the entry that names it, from 0."""
    identity: str
    """Changes with the content: hash of size, times and both ends of a local file, commit or ETag of a remote one."""
    version: str = ""
    """Of a local file (downloaded ones included) when it was resolved; see `check_unchanged`."""
    max_row_bytes: int = MAX_ROW_BYTES
    """`data.max_row_bytes`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its columns by name, and its place."""

    values: dict[str, Any]
    file: str
    index: int
    """Number of the row in its file, from 0; blank lines do not count."""
    fault: str = ""
    """Why the row cannot be decoded (`values` is empty then); the same text for all rows with the same fault."""
    has_added_nulls: bool = False
    """Whether structs have the fields of all rows, as in Arrow, so that a null there may be a field that the row does
    not have; in JSON, a null is one that was written."""

    @property
    def where(self) -> str:
        """`file:row`, for messages."""
        return f"{self.file}:{self.index}"


@dataclass(frozen=True)
class Chunk(ABC):
    """Consecutive rows of one file, undecoded, so that a worker process can decode them. Can be pickled."""

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
        """The rows in order; one that cannot be decoded has its fault."""


@dataclass(frozen=True)
class FaultyChunk(Chunk):
    """A row that cannot be decoded safely, or is too large."""

    fault: str

    def __len__(self) -> int:
        return 1

    def skip(self, count: int) -> FaultyChunk:
        assert not count
        return self

    def rows(self) -> Iterator[Row]:
        yield Row({}, self.file, self.first, self.fault)


def too_large(file: DataFile, row: int) -> FaultyChunk:
    """In place of a row above `data.max_row_bytes`."""
    return FaultyChunk(file.name, row, f"row larger than data.max_row_bytes={file.max_row_bytes}")


KINDS: dict[str, FileKind] = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_KINDS = ("jsonl", "csv")  # the other kinds compress internally

KNOWN = "parquet, jsonl, ndjson, json, csv, tsv (the last five also with .gz or .zst), arrow, feather"

# Metadata that tools write next to the data.
_NO_DATA = {
    "config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "metadata.json", "state.json",
}  # fmt: skip
LABELS: dict[FileKind, str] = {"parquet": "parquet", "jsonl": "JSON lines", "csv": "CSV", "arrow": "Arrow"}


def without_query(name: str) -> str:
    """A URL without credentials, query and fragment; anything else as it is. Messages use it."""
    try:
        is_web = urlsplit(name).scheme in ("http", "https")
    except ValueError:  # not a URL, e.g. with an unclosed bracket
        is_web = False
    return redact_urls(name.partition("?")[0].partition("#")[0] if is_web else name)


def suffixes(name: str) -> tuple[str, str]:
    """Suffixes of kind and compression in lower case: `a.JSONL.gz` gives (.jsonl, .gz), `a.csv` gives (.csv, '')."""
    parts = [suffix.lower() for suffix in PurePosixPath(without_query(name)).suffixes]
    compression = parts.pop() if parts and parts[-1] in COMPRESSIONS else ""
    return parts[-1] if parts else "", compression


def kind_of(name: str) -> FileKind | None:
    """The kind of a file by its name, or None for one that is not supported."""
    suffix, compression = suffixes(name)
    kind = KINDS.get(suffix)
    return None if compression and kind not in _COMPRESSED_KINDS else kind


def checked_kind(name: str, *, what: str) -> FileKind:
    """The kind of a file; raises UserError, beginning with `what`, for a name that does not determine it."""
    kind = kind_of(name)
    if kind is None:
        ending = "".join(suffixes(name))
        problem = f"files that end in {ending} are not read" if ending else "the name does not tell what the file holds"
        raise UserError(f"{what}: {problem}; rename or convert it so that it ends in one of {KNOWN}")
    return kind


def data_files(names: Iterable[str]) -> list[str]:
    """The data files among these, sorted; without hidden files and folders and without metadata."""
    found = []
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if not hidden and kind_of(name) is not None and parts[-1].lower() not in _NO_DATA:
            found.append(name)
    return sorted(found)


def of_one_kind(names: Sequence[str], *, what: str, where: str) -> list[str]:
    """The names if all are of one kind; plain `.json` files next to another kind are metadata and are dropped.

    what: start of messages; where: start of the glob to suggest, e.g. `folder/`.
    Raises UserError that names the kinds otherwise.
    """
    kinds = {kind_of(name) for name in names}
    plain_json = [name for name in names if suffixes(name) == (".json", "")]
    if len(kinds) > 1 and plain_json:
        names = [name for name in names if name not in plain_json]
        log.warning("%s: %s ignored, as metadata of the other files", what, ", ".join(plain_json[:3]))
        kinds = {kind_of(name) for name in names}
    if len(kinds) > 1:
        labels = " and ".join(sorted(LABELS[kind] for kind in kinds if kind))
        first = suffixes(sorted(names)[0])
        raise UserError(f"{what}: holds {labels} files; select one kind, e.g. {where}*{''.join(first)}")
    return list(names)
