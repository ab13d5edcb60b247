"""JSON lines and CSV as chunks of lines, and a line as a row. A `.json` file may hold one list of objects instead.

Every cell of CSV is text; an empty one is None.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from rm_gallery.data.sources.records import CHUNK_BYTES, CHUNK_ROWS, MAX_ROW_BYTES, Chunk, DataFile, Row, suffixes
from rm_gallery.data.sources.tables import NOT_UTF8, check_names, open_text
from rm_gallery.errors import UserError

_BOM = b"\xef\xbb\xbf"
_MAX_DEPTH = 100
_TOO_DEEP = f"JSON that is nested more than {_MAX_DEPTH} deep"
_MAX_LIST_BYTES = 1 << 30
"""Of a file that is one JSON list, which is parsed as a whole; decompressed."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LineChunk(Chunk):
    """Rows as the bytes of a JSON value each."""

    lines: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def skip(self, count: int) -> LineChunk:
        return LineChunk(self.file, self.first + count, self.lines[count:])

    def rows(self) -> Iterator[Row]:
        for index, line in enumerate(self.lines, start=self.first):
            try:
                yield Row(_parse(line), self.file, index)
            except _Fault as fault:
                yield Row({}, self.file, index, str(fault))


class _Fault(Exception):
    """Why a line is not a row."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _Fault("JSON object with a duplicate key")
    return values


_decode = json.JSONDecoder(object_pairs_hook=_refuse_duplicates).decode
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = _decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Fault(NOT_UTF8) from None
    except ValueError:
        raise _Fault("line that is not valid JSON") from None
    except RecursionError:
        raise _Fault(_TOO_DEEP) from None
    if not isinstance(values, dict):
        raise _Fault("JSON that is not an object")
    if line.count(b"[") + line.count(b"{") > _MAX_DEPTH and _is_too_deep(values):
        raise _Fault(_TOO_DEEP)
    if b"\\u" in line and _SURROGATE.search(line) and _has_lone_surrogate(values):
        raise _Fault("text with a lone surrogate")
    return values


def _has_lone_surrogate(values: dict[str, Any]) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _is_too_deep(values: Any) -> bool:
    level = [values]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def read_json(file: DataFile, start: int = 0) -> Iterator[Chunk]:
    """Chunks of a file with one JSON value per line, or with one list of objects. Blank lines are not rows."""
    with open_text(file) as stream:
        lines = _lines(stream, file.name)
        if suffixes(file.name)[0] == ".json":
            head = stream.peek(4096).removeprefix(_BOM).lstrip()
            if head.startswith(b"["):
                lines = _list_elements(stream, file.name)
            elif head.split(b"\n", 1)[0].strip() == b"{":
                raise UserError(
                    f"{file.name}: one JSON object over several lines; write one object per line, or a list of objects"
                )
        for first, part in _chunked(lines, len):
            yield LineChunk(file.name, first, part)


def _lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Lines without line ends and without blank lines."""
    index = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise UserError(
                f"{name}:{index}: the line is longer than {MAX_ROW_BYTES >> 20} MiB; write one JSON object per line"
            )
        line = (line.removeprefix(_BOM) if index == 0 else line).strip()
        if line:
            yield line
            index += 1


_BLANK = re.compile(r"[ \t\r\n]*")


def _list_elements(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The elements of a JSON list, each as its own bytes; the file is held in memory.

    Raises UserError, naming the element, where the list is not valid JSON.
    """
    data = stream.read(_MAX_LIST_BYTES + 1)
    if len(data) > _MAX_LIST_BYTES:
        raise UserError(
            f"{name}: a JSON list of more than {_MAX_LIST_BYTES >> 20} MiB is not read; write JSON lines, one object "
            "per line"
        )
    # Bytes that are not UTF-8 are a fault of their row, not of the file.
    text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    del data

    def skip_blank(place: int) -> int:
        match = _BLANK.match(text, place)
        return match.end() if match else place

    decode = json.JSONDecoder().raw_decode
    place, index = skip_blank(text.index("[") + 1), 0
    try:
        while index or text[place] != "]":
            end = decode(text, place)[1]
            yield text[place:end].encode("utf-8", "surrogateescape")
            place, index = skip_blank(end), index + 1
            if text[place] == "]":
                break
            if text[place] != ",":
                raise ValueError
            place = skip_blank(place + 1)
    except RecursionError:
        raise UserError(f"{name}:{index}: {_TOO_DEEP}; remove the object") from None
    except (ValueError, IndexError):
        problem = "the file ends inside the list" if text.find("]", place) < 0 else "the list is not valid JSON here"
        raise UserError(f"{name}:{index}: {problem}; recreate it, or write JSON lines") from None
    if skip_blank(place + 1) != len(text):
        raise UserError(f"{name}:{index}: text follows the end of the list; write one list, or one object per line")


def _chunked(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[tuple[int, tuple[_Item, ...]]]:
    """Items in chunks of at most CHUNK_ROWS and about CHUNK_BYTES, each with the number of its first item."""
    first, held, size = 0, list[_Item](), 0
    for item in items:
        held.append(item)
        size += size_of(item)
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield first, tuple(held)
            first, held, size = first + len(held), [], 0
    if held:
        yield first, tuple(held)


@dataclass(frozen=True)
class CellChunk(Chunk):
    """Rows as lists of cells; None for a row that is not valid CSV."""

    names: tuple[str, ...]
    """Columns by the header; '' for one without a name, whose cells are dropped."""
    cells: tuple[list[str] | None, ...]
    """Bytes that are not UTF-8 are lone surrogates in them."""

    def __len__(self) -> int:
        return len(self.cells)

    def skip(self, count: int) -> CellChunk:
        return CellChunk(self.file, self.first + count, self.names, self.cells[count:])

    def rows(self) -> Iterator[Row]:
        for index, cells in enumerate(self.cells, start=self.first):
            fault = self._fault(cells)
            values = {} if fault else {name: cell or None for name, cell in zip(self.names, cells or (), strict=True)}
            values.pop("", None)
            yield Row(values, self.file, index, fault)

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


def read_csv(file: DataFile, start: int = 0) -> Iterator[Chunk]:
    """Chunks of a CSV file with a header. Blank lines are not rows."""
    # The default limit of the csv module, which is per process, is too low for long conversations.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with open_text(file) as stream:
        delimiter = _delimiter(file.name, stream.peek(4096))
        with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
            records = _records(text, delimiter, file.name)
            names = next(records, [])
            if names is None:
                raise UserError(f"{file.name}: the header is not valid CSV; recreate the file")
            check_names(file.name, [name for name in names if name])
            for first, part in _chunked(records, lambda cells: sum(map(len, cells or ()))):
                yield CellChunk(file.name, first, tuple(names), part)


def _delimiter(name: str, start: bytes) -> str:
    """A comma, or what spreadsheets write instead if the header has none."""
    if suffixes(name)[0] == ".tsv":
        return "\t"
    header = start.split(b"\n", 1)[0]
    return next((mark for mark in ",\t;" if mark.encode() in header), ",")


def _records(text: io.TextIOWrapper, delimiter: str, name: str) -> Iterator[list[str] | None]:
    """The header and the rows as cells; None for a row that is not valid CSV."""
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
                raise UserError(f"{lines.where}: a quoted cell starts here and never ends; close the quote") from error
            cells = None
        if cells != []:
            yield cells
            lines.index += 1


class _Lines:
    """The lines of a file; bounds the row that a missing closing quote can make."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self.size = 0
        """Characters of the current row so far."""
        self.index = -1
        """Number of the current row; -1 for the header."""
        self.ended = False
        self._text, self._name = text, name

    @property
    def where(self) -> str:
        return self._name if self.index < 0 else f"{self._name}:{self.index}"

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES)
        self.size += len(line)
        self.ended = not line
        if self.ended:
            raise StopIteration
        if self.size >= MAX_ROW_BYTES:
            raise UserError(f"{self.where}: the row is longer than {MAX_ROW_BYTES >> 20} MiB; close a missing quote")
        return line
