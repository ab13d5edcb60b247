"""JSON lines as chunks of lines, and a line as a row. A `.json` file may be a list of objects instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from rm_gallery.data.source.arrow import NOT_UTF8
from rm_gallery.data.source.json_list import split_list
from rm_gallery.data.source.names import suffixes
from rm_gallery.data.source.opening import open_text
from rm_gallery.data.source.records import CHUNK_BYTES, CHUNK_ROWS, LONGEST_ROW, Chunk, DataFile, Row
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


def read_json(file: DataFile) -> Iterator[Chunk]:
    """Chunks of a file with one JSON value a line, or with a list of them. Blank lines are no rows."""
    with open_text(file) as stream:
        if suffixes(file.name)[0] == ".json":
            start = stream.peek(4096).removeprefix(_BOM).lstrip()
            if start.startswith(b"["):
                yield from _chunks(split_list(stream, file.name), file.name)
                return
            if start.split(b"\n", 1)[0].strip() == b"{":
                raise UserError(
                    f"{file.name}: one JSON object over several lines; write one object a line, or a list of objects"
                )
        yield from _chunks(_lines(stream, file.name), file.name)


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


def _chunks(lines: Iterable[bytes], name: str) -> Iterator[Chunk]:
    first, held, size = 0, [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield LineChunk(name, first, tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield LineChunk(name, first, tuple(held))
