"""A JSON list of objects, of any length, taken apart without being parsed as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from rm_gallery.data.source.records import LONGEST_ROW
from rm_gallery.errors import UserError

_READ = 1 << 20
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
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
        while not self._ended:
            if self._skip:
                place, self._skip = place + 1, False
            match = (_INSIDE if self._in_string else _OUTSIDE).search(data, place)
            if match is None:
                break
            mark, place = match[0], match.end()
            if self._in_string:
                self._in_string = mark != b'"'
                self._skip = mark == b"\\"
                if self._skip and place == len(data):
                    break
                continue
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
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
