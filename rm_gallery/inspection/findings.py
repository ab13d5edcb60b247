"""Findings: how many rows or pairs have some property, with the first of them as examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rm_gallery.errors import Dropped

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """`count` of `total` things have the property that `title` names."""

    key: str
    """Name for programs; stays the same between versions."""
    title: str
    """Name for people."""
    count: int
    total: int
    why: str
    """One sentence: what this means for training."""
    examples: tuple[str, ...] = ()
    """`file:row` of the first ones, or two of them for a pair of rows."""

    @property
    def share(self) -> float:
        """From 0 to 1; 0 of nothing is 0."""
        return self.count / self.total if self.total else 0.0


def dropped_findings(dropped: Dropped, num_kept: int) -> list[Finding]:
    """One finding per reason, the most frequent first."""
    total = num_kept + dropped.total
    ordered = sorted(dropped.counts.items(), key=lambda item: (-item[1], item[0]))
    return [Finding("dropped", reason, count, total, "", (dropped.examples[reason],)) for reason, count in ordered]


def find(findings: Iterable[Finding], key: str) -> Finding | None:
    """The finding of this key, or None when it was not looked for."""
    return next((each for each in findings if each.key == key), None)
