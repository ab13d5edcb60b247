"""The table: what is kept of every group, response and pair after one pass, as flat arrays of numbers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rm_gallery.inspection.near_duplicates import Signatures
from rm_gallery.inspection.views import GroupView, hash_text, words_of
from rm_gallery.schema import Comparison, PreferenceGroup

# N groups, R responses, C pairs (comparisons)

_NEAR_CHARS = 3000  # more than near.MAX_WORDS words of most texts; the rest is not looked at
_MAX_SOURCES = 10_000


@dataclass(frozen=True)
class Table:
    """One side of the data in about 150 bytes a pair, whatever its length."""

    prompt: np.ndarray
    """[N] uint64: hash of the prompt."""
    prompt_chars: np.ndarray
    """[N] int64."""
    source: np.ndarray
    """[N] int64: index into `sources`."""
    signatures: np.ndarray
    """[N, 32] uint16, see near_duplicates.py."""
    comparable: np.ndarray
    """[N] bool: long enough for near duplicates."""
    first_response: np.ndarray
    """[N + 1] int64: where each group's responses begin."""
    response: np.ndarray
    """[R] uint64: hash of the response."""
    chars: np.ndarray
    """[R] int64: characters of the response."""
    group: np.ndarray
    """[C] int64."""
    better: np.ndarray
    """[C] int64: index of a response, over the whole table."""
    worse: np.ndarray
    """[C] int64."""
    flags: np.ndarray
    """[C] int64: see suspicious.py."""
    sources: tuple[str, ...]
    styles: dict[str, int]
    """Groups by input style."""
    places: Places

    @property
    def num_groups(self) -> int:
        return len(self.prompt)

    @property
    def num_pairs(self) -> int:
        return len(self.group)

    def where(self, group: int) -> str:
        """`file:row` of a group."""
        return self.places.where(group)

    def prompt_share(self) -> float:
        """Share of groups that have the most frequent prompt."""
        if not self.num_groups:
            return 0.0
        return float(np.unique(self.prompt, return_counts=True)[1].max() / self.num_groups)


class Places:
    """`file:row` of every group, in 12 bytes."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._file = array("i")
        self._row = array("q")

    def add(self, where: str) -> None:
        file, _, row = where.rpartition(":")
        if not row.isascii() or not row.isdigit() or len(row) > 18:
            file, row = where, "-1"
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._row.append(int(row))

    def where(self, index: int) -> str:
        file = list(self._files)[self._file[index]]
        return file if self._row[index] < 0 else f"{file}:{self._row[index]}"


class TableBuilder:
    """Takes groups one by one."""

    def __init__(
        self, prompt_key: Callable[[PreferenceGroup], str], check: Callable[[GroupView, Comparison], int]
    ) -> None:
        self._prompt_key, self._check = prompt_key, check
        self._prompt, self._response = array("Q"), array("Q")
        self._prompt_chars, self._source, self._chars = array("q"), array("q"), array("q")
        self._first, self._flags = array("q", [0]), array("q")
        self._group, self._better, self._worse = array("q"), array("q"), array("q")
        self._sources: dict[str, int] = {}
        self._styles: Counter[str] = Counter()
        self._places = Places()
        self._signatures = Signatures()

    def add(self, group: PreferenceGroup, view: GroupView) -> None:
        """Keep the numbers of one group."""
        number, first = len(self._prompt), self._first[-1]
        self._prompt.append(hash_text(self._prompt_key(group)))
        self._prompt_chars.append(len(view.prompt))
        source = group.source if group.source in self._sources or len(self._sources) < _MAX_SOURCES else "(others)"
        self._source.append(self._sources.setdefault(source, len(self._sources)))
        self._styles[group.style] += 1
        self._places.add(group.where)
        for text in view.responses:
            self._response.append(hash_text(text))
            self._chars.append(len(text))
        self._first.append(first + len(view.responses))
        for comparison in group.comparisons:
            self._group.append(number)
            self._better.append(first + comparison.better)
            self._worse.append(first + comparison.worse)
            self._flags.append(self._check(view, comparison))
        self._signatures.add(
            words_of(view.prompt[-2 * _NEAR_CHARS :]), [words_of(text[:_NEAR_CHARS]) for text in view.responses]
        )

    def finish(self) -> Table:
        signatures, comparable = self._signatures.finish()
        return Table(
            prompt=_numbers(self._prompt, np.uint64),
            prompt_chars=_numbers(self._prompt_chars),
            source=_numbers(self._source),
            signatures=signatures,
            comparable=comparable,
            first_response=_numbers(self._first),
            response=_numbers(self._response, np.uint64),
            chars=_numbers(self._chars),
            group=_numbers(self._group),
            better=_numbers(self._better),
            worse=_numbers(self._worse),
            flags=_numbers(self._flags),
            sources=tuple(self._sources),
            styles=dict(self._styles),
            places=self._places,
        )


def _numbers(values: array[int], dtype: type = np.int64) -> np.ndarray:
    """The same memory as a numpy array."""
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)
