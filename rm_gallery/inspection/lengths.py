"""Lengths: how long the texts are, what sharing and packing save against padding, how often longer is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import PackingConfig, epoch_order, split_steps
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.inspection.collect import Lengths
from rm_gallery.inspection.findings import MAX_EXAMPLES
from rm_gallery.inspection.table import Table


@dataclass(frozen=True)
class LongerReport:
    """Pairs by which response is longer."""

    unit: str
    """`characters`, `tokens` or `words`."""
    longer_chosen: int
    shorter_chosen: int
    ties: int

    @property
    def share(self) -> float | None:
        """Of the pairs without a tie, those whose longer response is the chosen one; None when all are ties."""
        decided = self.longer_chosen + self.shorter_chosen
        return self.longer_chosen / decided if decided else None


def longer_report(table: Table, lengths: np.ndarray, *, unit: str) -> LongerReport:
    """lengths: [R], of each response."""
    difference = lengths[table.better] - lengths[table.worse]
    return LongerReport(unit, int((difference > 0).sum()), int((difference < 0).sum()), int((difference == 0).sum()))


@dataclass(frozen=True)
class SourceReport:
    """One data set of a mixture."""

    name: str
    pairs: int
    share: float
    longer_chosen: float | None
    """By characters, without ties."""


def source_reports(table: Table, *, most: int = 20) -> list[SourceReport]:
    """The largest sources first; nothing when there is only one. What is beyond `most` becomes one line."""
    if len(table.sources) < 2 or not table.num_pairs:
        return []
    source = table.source[table.group]
    difference = table.chars[table.better] - table.chars[table.worse]
    masks = (np.ones(len(source), bool), difference > 0, difference < 0)
    counts = np.stack([np.bincount(source[mask], minlength=len(table.sources)) for mask in masks], axis=1)
    rows = [(name, *row) for name, row in zip(table.sources, counts.tolist(), strict=True)]
    rows.sort(key=lambda row: (-row[1], row[0]))
    if len(rows) > most:
        rest = np.sum([row[1:] for row in rows[most - 1 :]], axis=0).tolist()
        rows = [*rows[: most - 1], (f"({len(rows) - most + 1} others)", *rest)]
    return [
        SourceReport(name or "(no name)", count, count / table.num_pairs, up / (up + down) if up + down else None)
        for name, count, up, down in rows
    ]


LongTexts = Literal["left out", "cut", "refused"]
NUM_BINS = 14
PADDED_BATCH = 8  # pairs of the batch that others pad to its longest
_PLANNED_STEPS = 16


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin holds everything from its edge on."""

    edges: tuple[int, ...]
    """Lower edge of each bin."""
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """How one length is spread over the groups or pairs."""

    key: str
    title: str
    smallest: int
    p50: int
    p90: int
    p99: int
    largest: int
    mean: float
    histogram: Histogram


@dataclass(frozen=True)
class LengthReport:
    """Lengths of one side."""

    unit: str
    spreads: tuple[Spread, ...]
    max_length: int | None
    num_encoded: int
    num_beyond: int
    """Groups with a text longer than `max_length`."""
    long_texts: LongTexts
    """What training does with those."""
    examples: tuple[str, ...]
    """`file:row` of the first ones that are not left out."""


@dataclass(frozen=True)
class CostReport:
    """Units that a model computes in one pass over the data, in four ways."""

    unit: str
    packed: int
    """Ours: no padding, the common prefix once. For a model that pads: texts of like length together."""
    separate: int
    """No padding, every text whole."""
    padded_batch: int
    """Every text padded to the longest of a batch of 8 pairs in random order."""
    padded_max: int | None
    """Every text padded to `max_length`."""
    micro_batches: float | None
    """Model calls of one optimizer step, from the first planned steps."""
    token_budget: int | None
    pads: bool
    """Whether the model is one that pads."""


def length_report(
    lengths: Lengths, table: Table, *, unit: str, max_length: int | None, long_texts: LongTexts
) -> LengthReport:
    """Spreads of the parts, and how many texts are too long."""
    spreads = [spread("prompt", "common prefix (prompt)", lengths.prefix)]
    if table.num_pairs:
        spreads += [
            spread("chosen", "chosen, behind the prefix", lengths.tails[table.better]),
            spread("rejected", "rejected, behind the prefix", lengths.tails[table.worse]),
        ]
    spreads.append(spread("whole", "longest whole text of a row", lengths.longest))
    is_beyond = np.zeros(len(lengths.longest), bool) if max_length is None else lengths.longest > max_length
    examples = [table.where(int(group)) for group in np.flatnonzero(is_beyond[lengths.is_kept])[:MAX_EXAMPLES]]
    num_beyond = int(is_beyond.sum())
    return LengthReport(unit, tuple(spreads), max_length, len(is_beyond), num_beyond, long_texts, tuple(examples))


def spread(key: str, title: str, values: np.ndarray) -> Spread:
    """Percentiles and a histogram of at least one value."""
    smallest, p50, p90, p99, largest = (int(v) for v in np.percentile(values, [0, 50, 90, 99, 100], method="lower"))
    return Spread(key, title, smallest, p50, p90, p99, largest, float(values.mean()), histogram(values))


def histogram(values: np.ndarray) -> Histogram:
    """At most NUM_BINS bins of equal, round width up to the 99th percentile; the last one is open."""
    low, top = int(values.min()), int(np.percentile(values, 99, method="higher"))
    width = _round_up(max(1, -(-(top - low + 1) // (NUM_BINS - 1))))
    start = low // width * width
    place = np.minimum((values - start) // width, NUM_BINS - 1)
    counts = np.bincount(place, minlength=1)
    return Histogram(tuple(start + width * i for i in range(len(counts))), tuple(counts.tolist()))


def _round_up(width: int) -> int:
    """1, 2, 5, 10, 20, 50, ..."""
    scale = 10 ** (len(str(width)) - 1)
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= width)


def cost_report(
    lengths: Lengths,
    table: Table,
    *,
    unit: str,
    max_length: int | None,
    packing: PackingConfig,
    token_budget: int | None,
    seed: int,
    pads: bool,
) -> CostReport:
    """What one epoch costs; `token_budget` None leaves the micro-batches out."""
    sizes = lengths.sizes(np.bincount(table.group, minlength=table.num_groups))
    counts = np.diff(lengths.first_response)
    order = epoch_order(len(sizes), seed=seed, epoch=0, shuffle=True)
    starts = np.arange(0, len(order), PADDED_BATCH)
    longest = np.maximum.reduceat(sizes.longest_text[order], starts) if len(order) else np.zeros(0, np.int64)
    texts = np.add.reduceat(counts[order], starts) if len(order) else np.zeros(0, np.int64)
    calls, padded = _plan(sizes, packing, token_budget, seed=seed, pads=pads) if token_budget else (None, None)
    separate = int((lengths.prefix * counts).sum() + lengths.tails.sum())
    return CostReport(
        unit=unit,
        packed=padded if pads and padded is not None else int(sizes.tokens.sum()),
        separate=separate,
        padded_batch=int((longest * texts).sum()),
        padded_max=None if max_length is None else int(counts.sum()) * max_length,
        micro_batches=calls,
        token_budget=token_budget,
        pads=pads,
    )


def _plan(
    sizes: GroupSizes, packing: PackingConfig, token_budget: int, *, seed: int, pads: bool
) -> tuple[float | None, int | None]:
    """Micro-batches of a step on one process, and padded tokens of the epoch, both from the first steps."""
    order = epoch_order(len(sizes), seed=seed, epoch=0, shuffle=packing.shuffle)
    steps = split_steps(order, sizes.num_comparisons, batch_size=packing.train_batch_size, drop_last=False)
    packer = Packer(token_budget, padded=pads)
    calls = groups = padded = 0
    for step in steps[:_PLANNED_STEPS]:
        of_step = sizes.of(step)
        [packs] = packer.pack(of_step)
        calls += len(packs)
        groups += len(step)
        padded += int(packer.pack_tokens(packs, of_step).sum())
    if not groups:
        return None, None
    return calls / min(len(steps), _PLANNED_STEPS), round(padded * len(sizes) / groups)
