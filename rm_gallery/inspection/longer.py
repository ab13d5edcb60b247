"""Longer: how often the longer response is the chosen one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
