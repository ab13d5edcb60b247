"""Benchmarks among the sets of `trainer.eval_sets`: their scores from the rewards of a validation."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rm_gallery.data.benchmarks.named import ABOUT, NOT_SCORED
from rm_gallery.data.benchmarks.published import BENCHMARKS
from rm_gallery.data.benchmarks.scores import Score
from rm_gallery.data.benchmarks.table import Table
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.store import Store
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

SCORE = "score"
"""Kind of the metrics: `val/NAME/score`, and `val/NAME/score/PART` for each section or subset."""


def hash_texts(groups: Sequence[TokenGroup]) -> list[int]:
    """A hash of the tokens of each whole text, in the order of `PackedBatch.reward_index`."""
    found = []
    for group in groups:
        prefix = hashlib.blake2b(group.prefix.tobytes(), digest_size=8)
        for tail in group.tails:
            whole = prefix.copy()
            whole.update(tail.tobytes())
            found.append(int.from_bytes(whole.digest(), "little"))
    return found


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark as tokens. Its rewards are found by the hashes of the texts, whose order validation changes."""

    name: str
    table: Table
    texts: np.ndarray = field(repr=False)
    """[R] uint64: hashes of the texts, in the order of the table."""

    @classmethod
    def of(cls, name: str, store: Store, key: str) -> BenchmarkSet:
        """The set of this benchmark; logs why its score is not comparable with published ones.

        Raises UserError if some response is in no comparison, since validation computes no reward for it.
        """
        data, groups = store.data, [store.data[index] for index in range(len(store.data))]
        for index, group in enumerate(groups):
            compared = {side for each in group.comparisons for side in (each.better, each.worse)}
            if len(compared) < len(group.tails):
                raise UserError(
                    f"{key}: {data.where(index)} has responses in no comparison, whose rewards the score of {name} "
                    "needs; evaluate checkpoints on it with rm-gallery evaluate"
                )
        about = [data.metadata(index)[ABOUT] for index in range(len(data))]
        texts = [text for group in groups for text in hash_texts([group])]
        made = cls(name, _table(data, groups, about), np.array(texts, np.uint64))
        lost = sum(count for reason, count in store.dropped.counts.items() if not reason.startswith(NOT_SCORED))
        lost += sum(len(each.comparisons) < row["comparisons"] for each, row in zip(groups, about, strict=True))
        notes = list(made.score(np.zeros(len(texts))).notes)
        if lost:
            notes.append(
                f"not comparable with published scores: {lost:,} rows are dropped, or truncated to equal texts"
            )
        for note in notes:
            log.warning("%s: %s: %s", key, BENCHMARKS[name].title, note)
        return made

    def score(self, rewards: np.ndarray) -> Score:
        """rewards: [R] in the order of the table."""
        return BENCHMARKS[self.name].score(self.table, rewards)

    def metrics(self, texts: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """`val/score` and `val/score/PART`, NaN if some reward is. texts: [N] uint64, sorted and distinct, and with
        rewards [N] of each."""
        place = np.searchsorted(texts, self.texts)
        assert len(texts) and np.array_equal(texts[np.minimum(place, len(texts) - 1)], self.texts), "all are scored"
        score = self.score(rewards[place])
        named = {} if score.overall is None else {f"val/{SCORE}": score.overall}
        named |= {f"val/{SCORE}/{part}": value for part, value in score.parts.items()}
        return named if np.isfinite(rewards[place]).all() else dict.fromkeys(named, math.nan)

    def metric_names(self) -> list[str]:
        """`score`, if the rows cover what it is made of, and `score/PART`."""
        score = self.score(np.zeros(len(self.texts)))
        return [*([] if score.overall is None else [SCORE]), *(f"{SCORE}/{part}" for part in score.parts)]


def _table(data: TokenData, groups: Sequence[TokenGroup], about: Sequence[dict[str, Any]]) -> Table:
    """about: of each group, what `BenchmarkReader` says about it."""
    quality: list[float] = []
    for group, row in zip(groups, about, strict=True):
        quality += row["quality"] or [math.nan] * len(group.tails)
    sizes = np.array([len(group.tails) for group in groups], np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)])
    comparisons = [(number, each) for number, group in enumerate(groups) for each in group.comparisons]
    owner = np.array([number for number, _ in comparisons], np.int64)
    labels = [row["label"] for row in about]
    return Table(
        files=list(data.files),
        file=np.asarray(data.file_numbers),
        row=np.array([int(data.where(index).rpartition(":")[2]) for index in range(len(data))], np.int64),
        prompt=np.asarray(data.prompt_hashes),
        subsets=list(data.sources),
        subset=np.asarray(data.source_numbers),
        first=first,
        length=data.tail_lengths.astype(np.int64),
        quality=np.array(quality, np.float64),
        group=owner,
        better=first[owner] + np.array([each.better for _, each in comparisons], np.int64),
        worse=first[owner] + np.array([each.worse for _, each in comparisons], np.int64),
        strength=np.array([math.nan if each.margin is None else each.margin for _, each in comparisons]),
        p_better=np.array([1.0 if each.p_better is None else each.p_better for _, each in comparisons]),
        labels=labels if any(labels) else [],
    )
