"""Rows that cannot be used: the reason as an exception, and the count by reason."""

from __future__ import annotations

from dataclasses import dataclass, field

_MOST_REASONS = 200  # those of chat templates may quote the row, and must not fill the memory
_OTHER = "left out for yet another reason"


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, the same for all rows with the same fault."""


@dataclass
class Dropped:
    """Rows left out, counted by reason, with the first one of each as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows of one reason, the first of them at `where`; past a number of reasons the rest are one."""
        if reason not in self.counts and len(self.counts) >= _MOST_REASONS:
            reason = _OTHER
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def describe(self, limit: int = 20) -> str:
        """`3 null chosen (first: train.parquet:17), 1 ...`, the most frequent first; at most `limit` reasons."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} {reason} (first: {self.examples[reason]})" for reason, count in ordered[:limit]]
        rest = ordered[limit:]
        if rest:
            parts.append(f"{sum(count for _, count in rest)} for {len(rest)} other reasons")
        return ", ".join(parts)
