"""The survey: one pass over the groups of a side, from which everything in the report is worked out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rm_gallery.errors import Dropped
from rm_gallery.inspection.baselines import MAX_PAIRS, SampledPair, sampled_pair
from rm_gallery.inspection.encoders import Encoder
from rm_gallery.inspection.measure import Lengths, LengthsBuilder, measure
from rm_gallery.inspection.reservoir import Reservoir
from rm_gallery.inspection.suspicious import flags_of
from rm_gallery.inspection.table import Table, TableBuilder
from rm_gallery.inspection.views import hash_text, view_of
from rm_gallery.schema import PreferenceGroup

log = logging.getLogger(__name__)

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
