"""Collecting: one pass over a set with one model, which gives the arrays that the metrics need and a few texts.

Texts are kept only of the worst mistakes, of the largest disagreements with another model, and of samples for the
baselines and the probes.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from rm_gallery.data.benchmarks.published import KEY
from rm_gallery.data.benchmarks.table import Item, Table, TableBuilder
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.evaluation.probes import ProbePair, probe_pair
from rm_gallery.evaluation.scorers import Rewards, Scorer
from rm_gallery.evaluation.sets import EvalSet, Reading
from rm_gallery.inspection.baselines import SampledPair, sampled_pair
from rm_gallery.inspection.texts import GroupTexts, texts_of
from rm_gallery.progress_bar import ProgressBar
from rm_gallery.sampling import Reservoir

log = logging.getLogger(__name__)

MAX_EXAMPLES = 20
MAX_TEXT = 4000
"""Characters of a text in an example."""
BASELINE_PAIRS = 2000
_MAX_ITEMS, _MAX_CHARS = 4096, 500_000  # that are scored together

Sink: TypeAlias = Callable[[Item, GroupTexts, Sequence[float]], None]
"""Called with every scored row."""
Margins: TypeAlias = dict[tuple[str, int, int, int], float]
"""Margin of a comparison of another model, by file, row and the places of the two responses."""


@dataclass(frozen=True, slots=True)
class Example:
    """A comparison with its texts."""

    where: str
    subset: str
    texts: GroupTexts
    better: int
    worse: int
    rewards: tuple[float, float]
    other_margin: float | None = None

    def as_dict(self) -> dict[str, Any]:
        parts = (self.texts.prompt, self.texts.responses[self.better], self.texts.responses[self.worse])
        row: dict[str, Any] = {"where": self.where, **({"subset": self.subset} if self.subset else {})}
        row["margin"] = self.rewards[0] - self.rewards[1]
        if self.other_margin is not None:
            row["margins"] = [self.other_margin, row["margin"]]
        row["rewards"] = list(self.rewards)
        for name, text in zip(("prompt", "better", "worse"), parts, strict=True):
            row[name] = text[:MAX_TEXT]
            if len(text) > MAX_TEXT:
                row.setdefault("truncated", {})[name] = len(text)
        return row


class _Largest:
    """The examples of the largest keys, largest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Example]] = []
        self._number = itertools.count()

    def offer(self, key: float, make: Callable[[], Example]) -> None:
        if len(self._heap) < MAX_EXAMPLES:
            heapq.heappush(self._heap, (key, -next(self._number), make()))
        elif key > self._heap[0][0]:
            heapq.heapreplace(self._heap, (key, -next(self._number), make()))

    def as_dicts(self) -> list[dict[str, Any]]:
        return [example.as_dict() for _, _, example in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


@dataclass
class Collected:
    """A set with the rewards of one model."""

    table: Table
    rewards: np.ndarray
    """[R] float64."""
    reading: Reading
    unscored: Dropped
    mistakes: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]
    probe_pairs: list[ProbePair]
    baseline_pairs: Reservoir[SampledPair]
    scoring_seconds: float
    seconds: float


@dataclass
class _Pass:
    """The state of a pass."""

    num_probe_pairs: int
    seed: int
    others: Margins | None
    sink: Sink | None
    builder: TableBuilder = field(default_factory=TableBuilder)
    rewards: array[float] = field(default_factory=lambda: array("d"))
    unscored: Dropped = field(default_factory=Dropped)
    mistakes: _Largest = field(default_factory=_Largest)
    disagreements: _Largest = field(default_factory=_Largest)

    def __post_init__(self) -> None:
        self.probes: Reservoir[ProbePair] = Reservoir(self.num_probe_pairs, seed=self.seed + 1)
        self.baselines: Reservoir[SampledPair] = Reservoir(BASELINE_PAIRS, seed=self.seed + 2)

    def add(self, items: Sequence[tuple[Item, GroupTexts]], results: Rewards) -> None:
        for (item, texts), rewards in zip(items, results, strict=True):
            if isinstance(rewards, BadRow):
                self.unscored.add(str(rewards), item.group.where)
                continue
            if isinstance(rewards, Exception):
                raise rewards
            self.builder.add(item, [len(text) for text in texts.responses])
            self.rewards.extend(rewards)
            self._keep(item, texts, rewards)
            if self.sink is not None:
                self.sink(item, texts, rewards)

    def _keep(self, item: Item, texts: GroupTexts, rewards: Sequence[float]) -> None:
        """Texts of this row that are needed later."""
        group = item.group
        file, _, row = group.where.rpartition(":")
        for each in group.comparisons:
            better, worse = each.better, each.worse
            margin = rewards[better] - rewards[worse]
            other = None if self.others is None else self.others.get((file, int(row), better, worse))

            def example(better: int = better, worse: int = worse, other: float | None = other) -> Example:
                return Example(group.where, item.subset, texts, better, worse, (rewards[better], rewards[worse]), other)

            if margin <= 0:
                self.mistakes.offer(-margin, example)
            if other is not None and (other > 0) != (margin > 0):
                self.disagreements.offer(abs(margin * other), example)  # a product does not depend on either scale
            if (place := self.baselines.wants()) is not None:
                pair = sampled_pair(item.prompt, texts.responses[better], texts.responses[worse])
                self.baselines.put(place, pair)
            if self.num_probe_pairs and (place := self.probes.wants()) is not None:
                self.probes.put(place, probe_pair(group, better, worse, rewards))


def collect(
    eval_set: EvalSet,
    scorer: Scorer,
    *,
    num_probe_pairs: int,
    seed: int,
    others: Margins | None = None,
    sink: Sink | None = None,
) -> Collected:
    """Score a set.

    others: margins of another model, to find where the two disagree. Raises UserError as `EvalSet.items`, for a reward
    that is not finite, and if no row can be scored.
    """
    began, scoring_seconds, reading = time.perf_counter(), 0.0, Reading()
    state = _Pass(num_probe_pairs, seed, others, sink)
    with ProgressBar(f"{scorer.name} {eval_set.name}", eval_set.max_items, log_unit="rows") as bar:
        for block in _blocks(eval_set.items(scorer.style, reading)):
            started = time.perf_counter()
            results = scorer.score([item.group for item, _ in block])
            scoring_seconds += time.perf_counter() - started
            state.add(block, results)
            bar.advance(len(block))
    if not state.builder.num_comparisons:
        raise UserError(
            f"{KEY}={eval_set.source}: model={scorer.name} can score no row: {state.unscored.describe()}; choose "
            "another model or set"
        )
    return Collected(
        state.builder.finish(),
        np.frombuffer(state.rewards, np.float64),
        reading,
        state.unscored,
        state.mistakes.as_dicts(),
        state.disagreements.as_dicts(),
        state.probes.in_order(),
        state.baselines,
        scoring_seconds,
        time.perf_counter() - began,
    )


def _blocks(items: Iterable[Item]) -> Iterator[list[tuple[Item, GroupTexts]]]:
    """Rows that are scored together, with their texts."""
    block: list[tuple[Item, GroupTexts]] = []
    num_chars = 0
    for item in items:
        texts = texts_of(item.group)
        block.append((item, texts))
        num_chars += len(texts.prompt) + sum(map(len, texts.responses))
        if len(block) >= _MAX_ITEMS or num_chars >= _MAX_CHARS:
            yield block
            block, num_chars = [], 0
    if block:
        yield block


def margins_by_place(table: Table, margins: np.ndarray) -> Margins:
    """For `collect(others=...)`."""
    return {
        (table.files[file], row, better, worse): margin
        for (file, row, better, worse), margin in zip(table.keys().tolist(), margins.tolist(), strict=True)
    }
