"""The comparisons of a set as arrays, without their texts: what every metric is computed from.

About 100 bytes a response and 60 a comparison, so a million pairs need 300 MB.
"""

# G groups, R responses, C comparisons

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rm_gallery.schema import PreferenceGroup


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a set: a group whose comparisons are known."""

    group: PreferenceGroup
    prompt: int
    """Hash of the prompt."""
    subset: str = ""
    quality: Sequence[float] | None = None
    """Of each response, higher is better; None if only the comparisons are known."""
    label: str = ""
    """What a benchmark needs besides: an id, or the model that wrote the responses."""


@dataclass(frozen=True)
class Table:
    """A set without its texts."""

    files: list[str]
    file: np.ndarray
    """[G] int32: index in `files`."""
    row: np.ndarray
    """[G] int64: number of the row in its file."""
    prompt: np.ndarray
    """[G] uint64."""
    subsets: list[str]
    subset: np.ndarray
    """[G] int32: index in `subsets`."""
    first: np.ndarray
    """[G + 1] int64: where the responses of each group begin."""
    length: np.ndarray
    """[R] int64: characters."""
    quality: np.ndarray
    """[R] float64, NaN where unknown."""
    group: np.ndarray
    """[C] int64: group of each comparison."""
    better: np.ndarray
    """[C] int64: index in [R]."""
    worse: np.ndarray
    """[C] int64."""
    strength: np.ndarray
    """[C] float64: strength of the preference in the unit of the data, NaN where unknown."""
    p_better: np.ndarray
    """[C] float64: share of annotators who prefer the better response, 1 where unknown."""
    labels: list[str] = field(default_factory=list)
    """[G], or empty: see `Item.label`."""

    @property
    def num_groups(self) -> int:
        return len(self.row)

    @property
    def num_comparisons(self) -> int:
        return len(self.group)

    def where(self, comparison: int) -> str:
        """`file:row` of a comparison."""
        return self.where_group(int(self.group[comparison]))

    def where_group(self, group: int) -> str:
        return f"{self.files[self.file[group]]}:{self.row[group]}"

    def margins(self, rewards: np.ndarray) -> np.ndarray:
        """[C] reward of the better response minus that of the worse one."""
        return rewards[self.better] - rewards[self.worse]

    def subset_of(self) -> np.ndarray:
        """[C] index in `subsets` of each comparison."""
        return self.subset[self.group]

    def keys(self) -> np.ndarray:
        """[C, 4] file, row and the places of both responses in the group: the identity of a comparison."""
        starts = self.first[self.group]
        return np.stack(
            [self.file[self.group], self.row[self.group], self.better - starts, self.worse - starts], axis=1
        )


class TableBuilder:
    """Collects the items of a set in the order in which their rewards arrive."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._subsets: dict[str, int] = {}
        self._labels: list[str] = []
        self._file, self._row, self._subset = array("i"), array("q"), array("i")
        self._prompt, self._first, self._length = array("Q"), array("q", [0]), array("q")
        self._quality, self._strength, self._p_better = array("d"), array("d"), array("d")
        self._group, self._better, self._worse = array("q"), array("q"), array("q")

    @property
    def num_comparisons(self) -> int:
        return len(self._group)

    def add(self, item: Item, lengths: Sequence[int]) -> None:
        """lengths: characters of each response."""
        file, _, row = item.group.where.rpartition(":")
        number, start = len(self._row), self._first[-1]
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._row.append(int(row))
        self._prompt.append(item.prompt)
        self._subset.append(self._subsets.setdefault(item.subset, len(self._subsets)))
        if item.label or self._labels:
            self._labels += [""] * (number - len(self._labels)) + [item.label]
        self._length.extend(lengths)
        known = item.quality if item.quality is not None else [float("nan")] * len(lengths)
        self._quality.extend(known)
        self._first.append(start + len(lengths))
        for each in item.group.comparisons:
            self._group.append(number)
            self._better.append(start + each.better)
            self._worse.append(start + each.worse)
            self._strength.append(float("nan") if each.margin is None else each.margin)
            self._p_better.append(1.0 if each.p_better is None else each.p_better)

    def finish(self) -> Table:
        return Table(
            files=list(self._files),
            file=_array(self._file, np.int32),
            row=_array(self._row, np.int64),
            prompt=_array(self._prompt, np.uint64),
            subsets=list(self._subsets),
            subset=_array(self._subset, np.int32),
            first=_array(self._first, np.int64),
            length=_array(self._length, np.int64),
            quality=_array(self._quality, np.float64),
            group=_array(self._group, np.int64),
            better=_array(self._better, np.int64),
            worse=_array(self._worse, np.int64),
            strength=_array(self._strength, np.float64),
            p_better=_array(self._p_better, np.float64),
            labels=self._labels,
        )


def _array(values: array[int] | array[float], dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)


def quality_of(group: PreferenceGroup) -> list[float] | None:
    """Quality of each response of a ranking, from its comparisons; None for a pair.

    With strengths: minus the distance from a best response, in the unit of the data. Without: the share of the other
    responses that a response beats, a tie counting half.
    """
    count = len(group.responses)
    if count < 3:
        return None
    losers = {each.worse for each in group.comparisons}
    best = next((index for index in range(count) if index not in losers), None)
    if best is None:
        return None  # a cycle
    if all(each.margin is not None for each in group.comparisons):
        distance = {each.worse: each.margin or 0.0 for each in group.comparisons if each.better == best}
        return [-distance.get(index, 0.0) for index in range(count)]
    points = [(count - 1) / 2.0] * count
    for each in group.comparisons:
        points[each.better] += 0.5
        points[each.worse] -= 0.5
    return [value / (count - 1) for value in points]
