"""A JSON list of objects, of any length, taken apart without being parsed as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from rm_gallery.data.source.records import LONGEST_ROW
from rm_gallery.errors import UserError

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
