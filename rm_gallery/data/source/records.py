"""What sources hand on: files to read, chunks of them as they were read, and rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

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
    def rows(self) -> Iterator[Row]:
        """The rows in order; one that cannot be decoded carries its fault."""
