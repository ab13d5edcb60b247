"""JSON lines and CSV as chunks of lines, and a line as a row. A `.json` file may be a list of objects instead.

Such a list may be of any length: it is taken apart without being parsed as a whole. Every cell of CSV is text; an
empty one is None.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from rm_gallery.data.sources.records import CHUNK_BYTES, CHUNK_ROWS, LONGEST_ROW, Chunk, DataFile, Row, suffixes
from rm_gallery.data.sources.tables import NOT_UTF8, check_names, open_text
from rm_gallery.errors import UserError

_BOM = b"\xef\xbb\xbf"
_DEEPEST = 100
TOO_DEEP = f"JSON that is nested more than {_DEEPEST} deep"


@dataclass(frozen=True)
class LineChunk(Chunk):
    """Rows as the bytes of a JSON value each."""

    lines: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def skip(self, count: int) -> LineChunk:
        return LineChunk(self.file, self.first + count, self.lines[count:])

    def rows(self) -> Iterator[Row]:
        for offset, line in enumerate(self.lines):
            try:
                yield Row(_parse(line), self.file, self.first + offset)
            except _Fault as fault:
                yield Row({}, self.file, self.first + offset, str(fault))


class _Fault(Exception):
    """Why a line is no row."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _Fault("JSON object with a key that stands there twice")
    return values


_decode = json.JSONDecoder(object_pairs_hook=_once_each).decode


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        values = _decode(text)
    except UnicodeDecodeError:
        raise _Fault(NOT_UTF8) from None
    except ValueError:
        raise _Fault("line that is not valid JSON") from None
    except RecursionError:
        raise _Fault(TOO_DEEP) from None
    if not isinstance(values, dict):
        raise _Fault("JSON that is not an object")
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _is_too_deep(values):
        raise _Fault(TOO_DEEP)
    if b"\\u" in line and _HALF.search(line) and _has_half(values):
        raise _Fault("text with half of a surrogate pair")
    return values


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def _has_half(values: dict[str, Any]) -> bool:
    """Whether a text holds a lone surrogate, which JSON can write but no encoding of Unicode can."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _is_too_deep(values: Any) -> bool:
    level = [values]
    for _ in range(_DEEPEST):
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
    """Chunks of a file with one JSON value a line, or with a list of them. Blank lines are no rows."""
    with open_text(file) as stream:
        if suffixes(file.name)[0] == ".json":
            head = stream.peek(4096).removeprefix(_BOM).lstrip()
            if head.startswith(b"["):
                yield from _line_chunks(split_list(stream, file.name), file.name)
                return
            if head.split(b"\n", 1)[0].strip() == b"{":
                raise UserError(
                    f"{file.name}: one JSON object over several lines; write one object a line, or a list of objects"
                )
        yield from _line_chunks(_lines(stream, file.name), file.name)


def _lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Lines without their ends and without blank ones."""
    index = 0
    while line := stream.readline(LONGEST_ROW + 1):
        if len(line) > LONGEST_ROW:
            raise UserError(
                f"{name}:{index}: the line is longer than {LONGEST_ROW >> 20} MB; write one JSON object a line"
            )
        line = (line.removeprefix(_BOM) if index == 0 else line).strip()
        if line:
            yield line
            index += 1


def _line_chunks(lines: Iterable[bytes], name: str) -> Iterator[Chunk]:
    first, held, size = 0, [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield LineChunk(name, first, tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield LineChunk(name, first, tuple(held))


_READ = 1 << 20
_MARKS = re.compile(rb'["\[\]{},]')
_MARKS_WITHIN = re.compile(rb'["\[\]{}]')  # inside an element, where commas separate nothing of ours
_BACKSLASH = ord("\\")
_BLANK = b" \t\r\n"


def split_list(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The elements of the list that a stream holds, each as its bytes.

    Only brackets, strings and commas are looked at, so that an element may be damaged and the next one still found.
    Raises UserError for a list that does not end, and for text after its end.
    """
    scan = _Scan()
    index = 0
    while data := stream.read(_READ):
        for element in scan.feed(data):
            yield element
            index += 1
        if scan.held > LONGEST_ROW:
            raise UserError(f"{name}:{index}: the row is longer than {LONGEST_ROW >> 20} MB; is a quote missing?")
    if scan.depth:
        raise UserError(f"{name}:{index}: the file ends inside the list; it was cut off, write it again")
    if scan.rest.strip(_BLANK):
        raise UserError(f"{name}:{index}: text follows the end of the list; write one list, or one object a line")


class _Scan:
    """Where in a JSON text the scan stands; parts of the text are fed to it one after another."""

    def __init__(self) -> None:
        self.depth = 0
        """Open brackets; 0 before the list and after it."""
        self.rest = b""
        """After the list: the text that follows."""
        self._ended = False
        self._in_string = False
        self._skip = False  # the part before ended with a backslash inside a string
        self._element = bytearray()

    @property
    def held(self) -> int:
        """Bytes of the element that has not ended yet."""
        return len(self._element)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Elements that end within `data`."""
        place = begin = 0
        while not self._ended and place < len(data):
            if self._in_string:
                place = self._string_end(data, place)
                continue
            match = (_MARKS_WITHIN if self.depth > 1 else _MARKS).search(data, place)
            if match is None:
                break
            mark, place = match[0], match.end()
            if mark == b'"':
                self._in_string = True
                continue
            if mark in b"[{":
                self.depth += 1
                if self.depth == 1:
                    begin = place
            elif mark in b"]}":
                self.depth -= 1
            if self.depth == 0 or (self.depth == 1 and mark == b","):
                element = bytes(self._element) + data[begin : match.start()]
                self._element.clear()
                begin = place
                self._ended = self.depth == 0
                if element.strip(_BLANK) or mark == b",":
                    yield element.strip(_BLANK)
        if self._ended:
            self.rest = (self.rest + data[begin:].strip(_BLANK))[:100]
        else:
            self._element += data[begin:]

    def _string_end(self, data: bytes, place: int) -> int:
        """The place after the string in which the scan stands, or the end of the data."""
        first = place + self._skip  # what a backslash stands before is no end
        while (end := data.find(b'"', first)) >= 0:
            if _is_escaped(data, first, end):
                first = end + 1
                continue
            self._in_string = self._skip = False
            return end + 1
        self._skip = _is_escaped(data, first, len(data))
        return len(data)


def _is_escaped(data: bytes, first: int, place: int) -> bool:
    """Whether an odd number of backslashes stands before a place, none of them before `first`."""
    start = place
    while start > first and data[start - 1] == _BACKSLASH:
        start -= 1
    return (place - start) % 2 == 1


@dataclass(frozen=True)
class CellChunk(Chunk):
    """Rows as lists of cells; None for a row that the CSV rules forbid."""

    names: tuple[str, ...]
    """Columns by the header; '' for one without a name, whose cells are left out."""
    cells: tuple[list[str] | None, ...]
    """Bytes that are not UTF-8 stand in them as lone surrogates."""

    def __len__(self) -> int:
        return len(self.cells)

    def skip(self, count: int) -> CellChunk:
        return CellChunk(self.file, self.first + count, self.names, self.cells[count:])

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


def read_csv(file: DataFile, start: int = 0) -> Iterator[Chunk]:
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
            yield from _cell_chunks(records, tuple(names), file.name)


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


def _cell_chunks(records: Iterator[list[str] | None], names: tuple[str, ...], file: str) -> Iterator[Chunk]:
    first, held, size = 0, [], 0
    for cells in records:
        held.append(cells)
        size += sum(map(len, cells or ()))
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield CellChunk(file, first, names, tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield CellChunk(file, first, names, tuple(held))
