"""ExportSummary: what an export wrote, and what it left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MAX_REASONS = 20


@dataclass(frozen=True)
class Side:
    """One side of the split."""

    wanted: float
    """The share of the rows that was asked for."""
    num_rows: int
    num_prompts: int
    """Prompts; without prompts, sets of rows that share responses."""
    files: tuple[Path, ...]
    """Empty when the side is."""


@dataclass(frozen=True)
class ExportSummary:
    """What `export_data` did; `str(summary)` says it to a person."""

    num_cases: int
    sides: Mapping[str, Side]
    ties: int
    """Pairs of responses with the same score."""
    too_close: int
    """Pairs whose scores differ by less than `min_difference`."""
    identical: int
    """Pairs of the same response, scored twice with different results."""
    duplicates: int
    """Pairs, scored responses or groups that were there already."""
    contradictions: int
    """Pairs of responses to one prompt of which each is somewhere the better one."""
    contradictions_dropped: bool
    over_limit: int
    """Pairs beyond `max_pairs_per_prompt`."""
    unpaired: int
    """Responses that are alone with their prompt."""
    failures: Mapping[str, int]
    """Cases and responses that cannot be used, by reason."""
    examples: Mapping[str, str]
    """Reason -> the first place where it was met."""
    layout: str

    @property
    def num_rows(self) -> int:
        return sum(side.num_rows for side in self.sides.values())

    @property
    def num_failures(self) -> int:
        return sum(self.failures.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that were written."""
        return tuple(file for side in self.sides.values() for file in side.files)

    @property
    def empty_sides(self) -> tuple[str, ...]:
        return tuple(name for name, side in self.sides.items() if not side.num_rows)

    def __str__(self) -> str:
        what = "pairs" if self.layout == "pairs" else "groups of responses"
        lines = [f"{self.num_rows:,} {what} from {self.num_cases:,} cases"]
        for name, side in self.sides.items():
            share = side.num_rows / self.num_rows if self.num_rows else 0.0
            files = (
                ", ".join(map(str, side.files)) or "EMPTY, no file is written: there are too few prompts to split so"
            )
            lines.append(
                f"  {name}: {side.num_rows:,} ({share:.1%}, asked {side.wanted:.1%}) of {side.num_prompts:,} prompts: "
                f"{files}"
            )
        return "\n".join(lines + [f"  {line}" for line in self.left_out()])

    def left_out(self) -> list[str]:
        """One line for each kind of thing that gave no row, with its number."""
        kept = "both left out" if self.contradictions_dropped else "both kept"
        counted = {
            "ties": self.ties,
            "pairs with scores too close to each other": self.too_close,
            "pairs of one response that has two scores": self.identical,
            "duplicates": self.duplicates,
            f"contradictions (either response is the better one somewhere; {kept})": self.contradictions,
            "pairs above the limit per prompt": self.over_limit,
            "responses alone with their prompt": self.unpaired,
        }
        lines = [f"{count:,} {what}" for what, count in counted.items() if count]
        ordered = sorted(self.failures.items(), key=lambda item: (-item[1], item[0]))
        lines += [
            f"{count:,} not usable: {reason} (first: {self.examples[reason]})"
            for reason, count in ordered[:_MAX_REASONS]
        ]
        rest = ordered[_MAX_REASONS:]
        if rest:
            lines.append(f"{sum(count for _, count in rest):,} not usable for {len(rest)} other reasons")
        return lines
