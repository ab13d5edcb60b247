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

from rm_gallery.data.sources.records import CHUNK_BYTES, CHUNK_ROWS, Chunk, DataFile, Row, suffixes, too_large
from rm_gallery.data.sources.tables import NOT_UTF8, check_names, open_text
from rm_gallery.errors import UserError

_BOM = b"\xef\xbb\xbf"
_MAX_DEPTH = 100
_TOO_DEEP = f"JSON that is nested more than {_MAX_DEPTH} deep"
_MAX_LIST_BYTES = 1 << 30
"""Of a file that is one JSON list, which is parsed as a whole; decompressed."""

_PIECE = 1 << 20
"""Bytes or characters read at once of a row that is too large."""


class _TooLarge:
    """In place of a row above `data.max_row_bytes`."""


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
        lines = _lines(stream, file.max_row_bytes)
        if suffixes(file.name)[0] == ".json":
            head = stream.peek(4096).removeprefix(_BOM).lstrip()
            if head.startswith(b"["):
                lines = _list_elements(stream, file)
            elif head.split(b"\n", 1)[0].strip() == b"{":
                raise UserError(
                    f"{file.name}: one JSON object over several lines; write one object per line, or a list of objects"
                )
        yield from _chunked(lines, len, file, lambda first, part: LineChunk(file.name, first, part))


def _lines(stream: IO[bytes], limit: int) -> Iterator[bytes | _TooLarge]:
    """Lines without line ends and without blank lines."""
    index, most = 0, limit + len(_BOM) + 1
    while line := stream.readline(most):
        rest, content = line, (line.removeprefix(_BOM) if index == 0 else line).strip()
        is_long = len(content) > limit
        while len(line) == most and not rest.endswith(b"\n") and (rest := stream.readline(_PIECE)):
            is_long = is_long or bool(rest.strip())
        if content or is_long:
            yield _TooLarge() if is_long else content
            index += 1


_BLANK = re.compile(r"[ \t\r\n]*")


def _list_elements(stream: IO[bytes], file: DataFile) -> Iterator[bytes | _TooLarge]:
    """The elements of a JSON list, each as its own bytes; the file is held in memory.

    Raises UserError, naming the element, where the list is not valid JSON.
    """
    name, data = file.name, stream.read(_MAX_LIST_BYTES + 1)
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
            element = text[place:end].encode("utf-8", "surrogateescape")
            yield element if len(element) <= file.max_row_bytes else _TooLarge()
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


def _chunked(
    items: Iterable[_Item | _TooLarge],
    size_of: Callable[[_Item], int],
    file: DataFile,
    make: Callable[[int, tuple[_Item, ...]], Chunk],
) -> Iterator[Chunk]:
    """Items in chunks of at most CHUNK_ROWS and about CHUNK_BYTES; a row that is too large is a chunk by itself.

    make: the chunk of some items, from the number of the first.
    """
    first, held, size = 0, list[_Item](), 0
    for item in items:
        if not isinstance(item, _TooLarge):
            held.append(item)
            size += size_of(item)
        if held and (isinstance(item, _TooLarge) or len(held) == CHUNK_ROWS or size >= CHUNK_BYTES):
            yield make(first, tuple(held))
            first, held, size = first + len(held), [], 0
        if isinstance(item, _TooLarge):
            yield too_large(file, first)
            first += 1
    if held:
        yield make(first, tuple(held))


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
    csv.field_size_limit(max(csv.field_size_limit(), 2 * file.max_row_bytes))
    with open_text(file) as stream:
        delimiter = _delimiter(file.name, stream.peek(4096))
        with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
            records = _records(text, delimiter, file)
            header = next(records, [])
            if header is None or isinstance(header, _TooLarge):
                fault = "not valid CSV" if header is None else f"longer than data.max_row_bytes={file.max_row_bytes}"
                raise UserError(f"{file.name}: the header is {fault}; recreate the file")
            check_names(file.name, [name for name in header if name])
            names = tuple(header)
            yield from _chunked(
                records,
                lambda cells: sum(map(len, cells or ())),
                file,
                lambda first, part: CellChunk(file.name, first, names, part),
            )


def _delimiter(name: str, start: bytes) -> str:
    """A comma, or what spreadsheets write instead if the header has none."""
    if suffixes(name)[0] == ".tsv":
        return "\t"
    header = start.split(b"\n", 1)[0]
    return next((mark for mark in ",\t;" if mark.encode() in header), ",")


def _records(text: io.TextIOWrapper, delimiter: str, file: DataFile) -> Iterator[list[str] | _TooLarge | None]:
    """The header and the rows as cells; None for a row that is not valid CSV."""
    lines = _Lines(text, file)
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
            yield _TooLarge() if lines.is_too_large(cells) else cells
            lines.index += 1


# What does not change where a quoted cell ends: characters between the first and last of a run, and pairs of quotes.
_CONTENT = re.compile(r'([^"\r\n])[^"\r\n]+([^"\r\n])')
_QUOTES = re.compile(r'""(?:"")+')


class _Lines:
    """The lines of a file, for a csv reader; of a row that is too large, only what decides where it ends."""

    def __init__(self, text: io.TextIOWrapper, file: DataFile) -> None:
        self.size = 0
        """Characters of the current row so far."""
        self.index = -1
        """Number of the current row; -1 for the header."""
        self.ended = False
        self._text, self._name, self._limit = text, file.name, file.max_row_bytes

    @property
    def where(self) -> str:
        return self._name if self.index < 0 else f"{self._name}:{self.index}"

    def is_too_large(self, cells: list[str] | None) -> bool:
        """Whether the current row, with these cells, is above the limit; a character has up to four bytes."""
        if 4 * self.size <= self._limit:
            return False
        return self.size > self._limit or (
            sum(len(cell.encode("utf-8", "surrogateescape")) for cell in cells or ()) > self._limit
        )

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._limit + 1)
        is_first = not self.size
        self.size += len(line)
        self.ended = not line
        if self.ended:
            raise StopIteration
        if self.size <= self._limit:
            return line
        parts, piece = [], line
        while True:
            parts.append(_QUOTES.sub('""', _CONTENT.sub(r"\1\2", piece)))
            if piece.endswith(("\r", "\n")) or not (piece := self._text.readline(_PIECE)):
                break
        line = "".join(parts)
        # A further line of a row is inside a quoted cell.
        return line if is_first or '"' in line else ""
