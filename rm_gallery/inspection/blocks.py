"""Blocks: the few shapes that a report is drawn with, in the terminal and in HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from rm_gallery.inspection.lengths import Histogram
from rm_gallery.inspection.samples import Sample
from rm_gallery.inspection.verdicts import Verdict


@dataclass(frozen=True)
class Figure:
    """One line: what, how much, and what that means."""

    label: str
    value: str
    why: str = ""
    examples: tuple[str, ...] = ()
    stands_out: bool = False


@dataclass(frozen=True)
class Figures:
    """Lines below each other."""

    rows: tuple[Figure, ...]


@dataclass(frozen=True)
class Grid:
    """A table of numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bar:
    """One bar, from the left edge of its block."""

    label: str
    value: float
    text: str
    error: float = 0.0
    """Half width of the error mark; 0 draws none."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale."""

    bars: tuple[Bar, ...]
    start: float = 0.0
    end: float | None = None
    """None: the largest value."""
    mark: tuple[float, str] | None = None
    """A line across, with its label."""


@dataclass(frozen=True)
class Chart:
    """A histogram."""

    title: str
    histogram: Histogram
    unit: str
    mark: int | None = None
    """`data.max_length`, where it applies."""
    is_main: bool = False
    """Whether it is drawn where there is little room, in a terminal."""


@dataclass(frozen=True)
class Samples:
    """Groups as text."""

    samples: tuple[Sample, ...]
    unit: str


Block: TypeAlias = Figures | Grid | Bars | Chart | Samples | str
"""A string is a remark."""


@dataclass(frozen=True)
class Section:
    """A title, one line that says what is to be seen here, and the blocks."""

    title: str
    why: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """All of the report."""

    title: str
    lead: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]
