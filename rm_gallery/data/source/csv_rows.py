"""CSV files as chunks of cells. Every cell is text; an empty one is None."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from rm_gallery.data.source.arrow import NOT_UTF8, check_names
from rm_gallery.data.source.names import suffixes
from rm_gallery.data.source.opening import open_text
from rm_gallery.data.source.records import CHUNK_BYTES, CHUNK_ROWS, LONGEST_ROW, Chunk, DataFile, Row
from rm_gallery.errors import UserError


@dataclass(frozen=True)
class CellChunk(Chunk):
    """Rows as lists of cells; None for a row that the CSV rules forbid."""

    names: tuple[str, ...]
    """Columns by the header; '' for one without a name, whose cells are left out."""
    cells: tuple[list[str] | None, ...]
    """Bytes that are not UTF-8 stand in them as lone surrogates."""

    def __len__(self) -> int:
        return len(self.cells)

    def rows(self) -> Iterator[Row]:
        for offset, cells in enumerate(self.cells):
            fault = self._fault(cells)
            values = {} if fault else {name: cell or None for name, cell in zip(self.names, cells or (), strict=True)}
            values.pop("", None)
            yield Row(values, self.file, self.first + offset, fault)

    def _fault(self, cells: list[str] | None) -> str:
        if cells is None:
            return "row that is not valid CSV"
        if len(cells) != len(self.names):
            return f"row with {'more' if len(cells) > len(self.names) else 'fewer'} cells than the header"
        try:
            "".join(cells).encode("utf-8")
        except UnicodeEncodeError:
            return NOT_UTF8
        return ""


def read_csv(file: DataFile) -> Iterator[Chunk]:
    """Chunks of a CSV file with a header. Blank lines are no rows."""
    # The module's limit holds for the whole process and is too low for long conversations.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))
    with open_text(file) as stream:
        delimiter = _delimiter(file.name, stream.peek(4096))
        with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
            records = _records(text, delimiter, file.name)
            names = next(records, [])
            if names is None:
                raise UserError(f"{file.name}: the header is not valid CSV; write the file again")
            check_names(file.name, [name for name in names if name])
            yield from _chunks(records, tuple(names), file.name)


def _delimiter(name: str, start: bytes) -> str:
    """A comma, or what spreadsheets write instead where the header has none."""
    header = start.split(b"\n", 1)[0]
    if suffixes(name)[0] == ".tsv":
        return "\t"
    return next((mark for mark in ",\t;" if mark.encode() in header), ",")


def _records(text: io.TextIOWrapper, delimiter: str, name: str) -> Iterator[list[str] | None]:
    """The header and the rows as cells; None for one that the CSV rules forbid."""
    lines = _Lines(text, name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.size = 0
        cells: list[str] | None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:
                raise UserError(f"{lines.where}: a quoted cell begins here and never ends; close the quote") from error
            cells = None
        if cells != []:
            yield cells
            lines.index += 1


class _Lines:
    """The lines of a file, with a bound on what a quote that never ends can swallow."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self.size = 0
        """Characters of the row that is read."""
        self.index = -1
        """Its number; the header stands before row 0."""
        self.ended = False
        self._text, self._name = text, name

    @property
    def where(self) -> str:
        return self._name if self.index < 0 else f"{self._name}:{self.index}"

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_ROW)
        self.size += len(line)
        self.ended = not line
        if self.ended:
            raise StopIteration
        if self.size >= LONGEST_ROW:
            raise UserError(f"{self.where}: the row is longer than {LONGEST_ROW >> 20} MB; is a closing quote missing?")
        return line


def _chunks(records: Iterator[list[str] | None], names: tuple[str, ...], file: str) -> Iterator[Chunk]:
    first, held, size = 0, [], 0
    for cells in records:
        held.append(cells)
        size += sum(map(len, cells or ()))
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield CellChunk(file, first, names, tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield CellChunk(file, first, names, tuple(held))
