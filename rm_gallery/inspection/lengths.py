"""Lengths: percentiles, length bias, and the tokens of an epoch as the plan of training computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.plan import Mixture, Plan, epoch_order
from rm_gallery.data.batching.prompt_sharing import sizes_of
from rm_gallery.data.config import DataConfig
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.inspection.collect import Split
from rm_gallery.inspection.findings import MAX_EXAMPLES

LongTexts = Literal["dropped", "truncated", "refused"]
"""What training does with a text longer than `data.max_length`."""
NUM_BINS = 14
PADDED_BATCH = 8
"""Pairs of a padded batch, for comparison."""
_PLANNED_STEPS = 16
_MAX_SOURCES = 20


@dataclass(frozen=True)
class LengthBias:
    """Pairs by which response is longer."""

    unit: str
    """`characters`, `tokens` or `words`."""
    longer_chosen: int
    shorter_chosen: int
    ties: int

    @property
    def share(self) -> float | None:
        """Share of the pairs with different lengths whose longer response is chosen; None if all lengths are equal."""
        decided = self.longer_chosen + self.shorter_chosen
        return self.longer_chosen / decided if decided else None


def length_bias(split: Split, lengths: np.ndarray, *, unit: str) -> LengthBias:
    """lengths: [R], of each response."""
    difference = lengths[split.better].astype(np.int64) - lengths[split.worse]
    return LengthBias(unit, int((difference > 0).sum()), int((difference < 0).sum()), int((difference == 0).sum()))


@dataclass(frozen=True)
class SourceReport:
    """One dataset of a mixture."""

    name: str
    pairs: int
    share: float
    longer_chosen: float | None
    """By characters, without ties."""
    chosen_length: int
    """Median of the response, in tokens or words."""
    rejected_length: int
    flagged: int
    """Pairs with a suspicious match."""


def source_reports(split: Split) -> list[SourceReport]:
    """The largest sources first, at most 20, the rest as one; empty for a single source."""
    sources = split.data.sources
    if len(sources) < 2 or not split.num_pairs:
        return []
    source = split.data.source_numbers[split.group]
    counts = np.bincount(source, minlength=len(sources))
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda number: (-counts[number], sources[number]))
    shown, others = order, order[_MAX_SOURCES - 1 :]
    if len(order) > _MAX_SOURCES:
        shown = order[: _MAX_SOURCES - 1]
    reports = [_source_report(split, sources[number] or "(no name)", source == number) for number in shown]
    if len(shown) < len(order):
        reports.append(_source_report(split, f"({len(others)} others)", np.isin(source, others)))
    return reports


def _source_report(split: Split, name: str, mask: np.ndarray) -> SourceReport:
    """mask: [C] bool, the pairs of the source; at least one."""
    better, worse, tails = split.better[mask], split.worse[mask], split.data.tail_lengths
    difference = split.chars[better] - split.chars[worse]
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    chosen, rejected = (int(np.percentile(tails[each], 50, method="lower")) for each in (better, worse))
    return SourceReport(
        name=name,
        pairs=len(better),
        share=len(better) / split.num_pairs,
        longer_chosen=up / (up + down) if up + down else None,
        chosen_length=chosen,
        rejected_length=rejected,
        flagged=int((split.flags[mask] != 0).sum()),
    )


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin is open-ended."""

    edges: tuple[int, ...]
    """Lower edge of each bin."""
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one length over the groups or pairs."""

    key: str
    title: str
    min: int
    p50: int
    p90: int
    p99: int
    max: int
    mean: float
    histogram: Histogram


@dataclass(frozen=True)
class LengthReport:
    """Lengths of one split."""

    unit: str
    distributions: tuple[Distribution, ...]
    max_length: int | None
    num_encoded: int
    num_beyond: int
    """Groups with a text longer than `max_length`."""
    long_texts: LongTexts
    examples: tuple[str, ...]
    """`file:row` of the first ones that are not dropped."""


def length_report(split: Split, *, long_texts: LongTexts) -> LengthReport:
    """Percentiles of prompts, responses and whole texts, and how many exceed `data.max_length`."""
    unit, max_length = split.encoder.unit, split.encoder.max_length
    tails = split.data.tail_lengths
    responses = np.concatenate([tails[split.better], tails[split.worse]])
    distributions = (
        distribution("prompt", "prompt (common prefix)", split.data.prefix_lengths),
        distribution("chosen", "chosen, after the prefix", tails[split.better], like=responses),
        distribution("rejected", "rejected, after the prefix", tails[split.worse], like=responses),
        distribution("whole", "longest text of a row", split.longest),
    )
    is_beyond = np.zeros(len(split.longest), bool) if max_length is None else split.longest > max_length
    examples = [split.where(int(group)) for group in np.flatnonzero(is_beyond[split.encoded])[:MAX_EXAMPLES]]
    num_beyond = int(is_beyond.sum())
    return LengthReport(unit, distributions, max_length, len(is_beyond), num_beyond, long_texts, tuple(examples))


def distribution(key: str, title: str, values: np.ndarray, *, like: np.ndarray | None = None) -> Distribution:
    """Of at least one value; percentiles are values that occur. like: the values that the histogram's bins span."""
    low, p50, p90, p99, high = (int(v) for v in np.percentile(values, [0, 50, 90, 99, 100], method="lower"))
    return Distribution(
        key, title, low, p50, p90, p99, high, float(values.mean()), histogram(values, values if like is None else like)
    )


def histogram(values: np.ndarray, like: np.ndarray) -> Histogram:
    """At most NUM_BINS bins of equal, round width up to the 99th percentile of `like`; the last one is open-ended."""
    low, top = int(like.min()), int(np.percentile(like, 99, method="higher"))
    width = _round_up(max(1, -(-(top - low + 1) // (NUM_BINS - 1))))
    start = low // width * width
    last = min((int(like.max()) - start) // width, NUM_BINS - 1)
    counts = np.bincount(np.minimum((values - start) // width, last), minlength=last + 1)
    return Histogram(tuple(start + width * i for i in range(len(counts))), tuple(counts.tolist()))


def _round_up(width: int) -> int:
    """1, 2, 5, 10, 20, 50, ..."""
    scale = 10 ** (len(str(width)) - 1)
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= width)


@dataclass(frozen=True)
class CostReport:
    """Units that a model computes in one epoch, every group once, by batching method."""

    unit: str
    separate: int
    """Padding-free, every text whole."""
    packed: int
    """Padding-free, the common prefix of a group's responses once. Encoders: padded as training plans it."""
    shared: int | None
    """The same with groups of the same prompt in a step merged (`data.share_prompts`), from the planned steps."""
    padded_batch: int
    """Every text padded to the longest of a batch of 8 pairs in random order."""
    padded_max: int | None
    """Every text padded to `max_length`."""
    token_budget: int | None
    """Of a micro-batch; None without a model, as are all figures of the plan."""
    micro_batches: float | None
    """Of an optimizer step on one rank, mean of the planned steps."""
    fill: float | None
    """Share of the token budget that a micro-batch uses, mean of the planned steps."""
    pads: bool
    """Whether the model needs padding (encoders)."""


def cost_report(
    data: TokenData, config: DataConfig, packer: Packer | None, *, unit: str, max_length: int | None, seed: int,
    mixture: Mixture | None,
) -> CostReport:  # fmt: skip
    """packer: how training packs groups, on one rank; None without a model. mixture: of training data."""
    counts = data.sizes.num_responses.astype(np.int64)
    order = epoch_order(len(data), seed=seed, epoch=0, shuffle=True)
    starts = np.arange(0, len(order), PADDED_BATCH)
    longest = np.maximum.reduceat(data.sizes.longest_text[order].astype(np.int64), starts)
    pads = packer is not None and packer.padded
    packed = int(data.sizes.tokens.sum())
    planned = None if packer is None else _plan(data, config, packer, mixture, seed=seed)
    return CostReport(
        unit=unit,
        separate=int((data.prefix_lengths * counts).sum() + data.tail_lengths.sum()),
        packed=planned.tokens if planned and pads else packed,
        shared=planned.tokens if planned and not pads and config.share_prompts else None,
        padded_batch=int((longest * np.add.reduceat(counts[order], starts)).sum()),
        padded_max=None if max_length is None else int(counts.sum()) * max_length,
        token_budget=None if packer is None else packer.token_budget,
        micro_batches=None if planned is None else planned.micro_batches,
        fill=None if planned is None else planned.fill,
        pads=pads,
    )


@dataclass(frozen=True)
class _Planned:
    tokens: int
    micro_batches: float
    fill: float


def _plan(
    data: TokenData, config: DataConfig, packer: Packer, mixture: Mixture | None, *, seed: int
) -> _Planned | None:
    """Steps of the first epoch as training plans them, at most 16, evenly spaced; None if there is no step."""
    plan = Plan(data.sizes, config, packer, seed=seed, mixture=mixture, prompts=data.prompt_hashes)
    steps = plan.epoch_steps(0)
    if not len(steps):  # data.drop_last with less than one step of data
        return None
    indices = np.unique(np.linspace(0, len(steps) - 1, _PLANNED_STEPS).round().astype(int)).tolist()
    whole = tokens = calls = 0
    for index in indices:
        step = plan.step(data, steps[index])
        whole += int(packer.tokens(data.sizes.of(steps[index])).sum())
        tokens += int(packer.pack_tokens(step.packs[0], sizes_of(step.units)).sum())
        calls += len(step.packs[0])
    total = int(packer.tokens(data.sizes).sum())
    return _Planned(round(total * tokens / whole), calls / len(indices), tokens / (calls * packer.token_budget))
