"""Collecting: one pass over the groups of a side, from which everything in the report is worked out.

The lengths of every group are measured as it passes by, under the length policy that training uses.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.tokenization.token_group import split_prefix
from rm_gallery.errors import BadRow, Dropped
from rm_gallery.inspection.baselines import MAX_PAIRS, SampledPair, sampled_pair
from rm_gallery.inspection.suspicious import flags_of
from rm_gallery.inspection.table import Table, TableBuilder
from rm_gallery.inspection.views import Encoder, hash_text, view_of
from rm_gallery.sampling import Reservoir
from rm_gallery.schema import PreferenceGroup

log = logging.getLogger(__name__)

# N groups that are kept, R responses of theirs, E all groups that could be encoded

_ROWS_BETWEEN_LINES = 100_000


@dataclass(frozen=True)
class Side:
    """Training or validation data, not yet read."""

    name: str
    """`training` or `validation`."""
    files: tuple[str, ...]
    groups: Iterable[PreferenceGroup]
    dropped: Dropped
    """What the reading of `groups` leaves out is added here, and what the length policy does."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a side left behind."""

    side: Side
    table: Table
    lengths: Lengths
    pairs: Reservoir[SampledPair]
    shown: list[PreferenceGroup]
    """Groups drawn to be shown, in the order of the data."""


def survey(
    side: Side,
    encoder: Encoder,
    *,
    prompt_key: Callable[[PreferenceGroup], str],
    num_samples: int,
    seed: int,
) -> Survey:
    """Read every group once, keeping numbers and two samples, so that memory grows by some 150 bytes a pair.

    prompt_key: groups with equal keys have the same prompt.
    """
    table = TableBuilder(prompt_key, flags_of)
    lengths = LengthsBuilder()
    pairs: Reservoir[SampledPair] = Reservoir(MAX_PAIRS, seed=seed)
    shown: Reservoir[PreferenceGroup] = Reservoir(num_samples, seed=seed + 1)
    count = 0
    for count, group in enumerate(measure(side.groups, encoder, lengths=lengths, dropped=side.dropped), start=1):
        view = view_of(group)
        table.add(group, view)
        for comparison in group.comparisons:
            if (place := pairs.wants()) is not None:
                better, worse = view.responses[comparison.better], view.responses[comparison.worse]
                pairs.put(place, sampled_pair(hash_text(prompt_key(group)), better, worse))
        if (place := shown.wants()) is not None:
            shown.put(place, group)
        if count % _ROWS_BETWEEN_LINES == 0:
            log.info("%s: %s rows read", side.name, f"{count:,}")
    return Survey(side, table.finish(), lengths.finish(), pairs, shown.in_order())


_CHUNK_GROUPS = 512


@dataclass(frozen=True)
class Lengths:
    """Units (tokens or words) of a side. Built from `measure`, or from arrays that are there already."""

    prefix: np.ndarray
    """[N] int64: units that all responses of a group begin with, the prompt for the most part."""
    tails: np.ndarray
    """[R] int64: each response's own units behind the common prefix."""
    first_response: np.ndarray
    """[N + 1] int64: where each group's responses begin."""
    longest: np.ndarray
    """[E] int64: the longest whole text of each group before anything was left out or cut."""
    is_kept: np.ndarray
    """[E] bool: which of those are among the N."""

    def sizes(self, num_comparisons: np.ndarray) -> GroupSizes:
        """The same as packing wants it; num_comparisons: [N] int64."""
        counts = np.diff(self.first_response)
        if not len(counts):
            none = np.zeros(0, np.int64)
            return GroupSizes(none, none, none, none)
        starts = self.first_response[:-1]
        return GroupSizes(
            tokens=self.prefix + np.add.reduceat(self.tails, starts),
            longest_text=self.prefix + np.maximum.reduceat(self.tails, starts),
            num_responses=counts,
            num_comparisons=num_comparisons,
        )


class LengthsBuilder:
    """Collects lengths group by group."""

    def __init__(self) -> None:
        self._prefix, self._tails = array("q"), array("q")
        self._first, self._longest, self._is_kept = array("q", [0]), array("q"), array("b")

    def saw(self, longest: int) -> None:
        """A group was encoded; its longest text."""
        self._longest.append(longest)
        self._is_kept.append(0)

    def keep(self, prefix: int, tails: list[int]) -> None:
        """The group that was seen last is kept."""
        self._is_kept[-1] = 1
        self._prefix.append(prefix)
        self._tails.extend(tails)
        self._first.append(self._first[-1] + len(tails))

    def finish(self) -> Lengths:
        return Lengths(
            prefix=_numbers(self._prefix),
            tails=_numbers(self._tails),
            first_response=_numbers(self._first),
            longest=_numbers(self._longest),
            is_kept=np.array(self._is_kept, bool),
        )


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.int64) if len(values) else np.zeros(0, np.int64)


def measure(
    groups: Iterable[PreferenceGroup], encoder: Encoder, *, lengths: LengthsBuilder, dropped: Dropped
) -> Iterator[PreferenceGroup]:
    """The groups that training keeps, in order; lengths and what is left out are noted on the way."""
    source = iter(groups)
    while chunk := list(islice(source, _CHUNK_GROUPS)):
        for group, texts in _encode(chunk, encoder, dropped):
            try:
                fitted = split_prefix(*encoder.fit(texts, group))
            except BadRow as error:
                lengths.saw(max(len(ids) for ids in texts))
                dropped.add(str(error), group.where)
                continue
            lengths.saw(max(len(ids) for ids in texts))
            lengths.keep(len(fitted.prefix), [len(tail) for tail in fitted.tails])
            yield group


def _encode(
    chunk: list[PreferenceGroup], encoder: Encoder, dropped: Dropped
) -> Iterator[tuple[PreferenceGroup, list[list[int]]]]:
    for group, texts in zip(chunk, encoder.encode(chunk), strict=True):
        if isinstance(texts, BadRow):
            dropped.add(str(texts), group.where)
        else:
            yield group, texts
