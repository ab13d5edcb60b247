"""The page: the report in words, as the few blocks that terminal and HTML draw each in their way.

Examples name their files instead of whole paths.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from rm_gallery.inspection.baselines import BaselineReport
from rm_gallery.inspection.findings import Finding
from rm_gallery.inspection.lengths import CostReport, Histogram, LengthReport, LongerReport, LongTexts, SourceReport
from rm_gallery.inspection.report import Report, Sample, SideReport, Verdict, percent, verdicts


def page_of(report: Report) -> Page:
    """The report in words; files go by their names without folders where these tell them apart."""
    report = with_short_names(report)
    train = report.sides[0]
    sections = [*_facts(train, report), *_learning(train, report)]
    if len(report.sides) > 1:
        sections.append(_overlap(report))
    sections += _doubts(train)
    for side in report.sides[1:]:
        sections += [*_facts(side, report), *_doubts(side)]
    sections += [_samples(side, report.unit) for side in report.sides if side.samples]
    return Page("What the model will see", tuple(_lead(report)), tuple(verdicts(report)), tuple(sections))


def _lead(report: Report) -> Iterable[str]:
    for side in report.sides:
        files = ", ".join(side.files[:3]) + (f" and {len(side.files) - 3} more" if len(side.files) > 3 else "")
        yield f"{side.name}: {side.num_pairs:,} pairs in {side.num_groups:,} rows from {files}"
    if report.unit == "tokens":
        yield f"lengths in tokens, by the tokenizer and template of {report.tokenizer}"
    else:
        yield (
            "lengths in words, texts as they lie in the files: no model is named, so there is no tokenizer and no "
            "chat template (add model.partial_pretrain=FOLDER to see tokens)"
        )


def _facts(side: SideReport, report: Report) -> Iterable[Section]:
    yield Section(f"Rows of {side.name}", "What was read, and what was left out of training and why.", _rows(side))
    if len(side.sources) > 1:
        yield Section(f"Sources of {side.name}", "Where the pairs come from.", (_sources(side.sources),))
    yield Section(
        f"Lengths of {side.name}",
        f"In {report.unit}. What all responses of a row begin with (its prompt, for the most part) is computed once.",
        tuple(_lengths(side.lengths)),
    )


def _learning(side: SideReport, report: Report) -> Iterable[Section]:
    yield Section("Cost of one epoch", f"How many {report.unit} a model computes.", tuple(_cost(side.cost)))
    yield Section(
        "Is the longer one chosen?",
        "Far from 50%, a model can score well by looking at nothing but length.",
        (_longer(side.longer),),
    )
    yield _baselines(report.baselines)


def _doubts(side: SideReport) -> Iterable[Section]:
    yield Section(
        f"Duplicates in {side.name}", "Pairs that say the same, or the opposite.", (_findings(side.duplicates),)
    )
    yield Section(f"Suspicious pairs in {side.name}", "Worth a look; not wrong by themselves.", (_suspicious(side),))


def _rows(side: SideReport) -> tuple[Block, ...]:
    figures = [
        Figure("rows read", f"{side.num_rows:,}"),
        Figure("rows used", f"{side.num_groups:,}", f"as {' and '.join(sorted(side.styles))}"),
        Figure("pairs", f"{side.num_pairs:,}", "comparisons of two responses; a ranking of K gives several"),
        Figure("different prompts", f"{side.num_prompts:,}", _prompt_remark(side)),
    ]
    for each in side.dropped:
        figures.append(Figure(f"left out: {each.title}", _value(each), "", each.examples, True))
    return (Figures(tuple(figures)),)


def _prompt_remark(side: SideReport) -> str:
    if side.num_prompts == 1:
        return "all rows have the same prompt, or none: it cannot tell them apart"
    return f"the most frequent one stands in {percent(side.prompt_share)} of the rows"


def _sources(sources: Sequence[SourceReport]) -> Grid:
    rows = []
    for each in sources:
        longer = "-" if each.longer_chosen is None else f"{each.longer_chosen:.2f}"
        rows.append((each.name, f"{each.pairs:,}", percent(each.share), longer))
    return Grid(("source", "pairs", "share", "longer is chosen"), tuple(rows))


_LONG_TEXTS: dict[LongTexts, str] = {
    "left out": "they are left out (data.filter_overlong_prompts=true)",
    "cut": "they are cut (data.truncation), which may take the end of an answer or the question away",
    "refused": "training stops at the first of them (data.truncation=error)",
}


def _lengths(report: LengthReport) -> Iterable[Block]:
    if report.max_length is not None:
        share = report.num_beyond / report.num_encoded if report.num_encoded else 0.0
        yield Figures(
            (
                Figure(
                    f"rows longer than data.max_length={report.max_length:,}",
                    f"{report.num_beyond:,} ({percent(share)})",
                    _LONG_TEXTS[report.long_texts],
                    report.examples,
                    report.num_beyond > 0,
                ),
            )
        )
    header = (report.unit, "min", "median", "90%", "99%", "max", "mean")
    rows = []
    for each in report.spreads:
        points = (each.smallest, each.p50, each.p90, each.p99, each.largest)
        rows.append((each.title, *(f"{point:,}" for point in points), f"{each.mean:,.1f}"))
    yield Grid(header, tuple(rows))
    yield "90%: nine of ten are at most this long."
    for each in report.spreads:
        is_whole = each.key == "whole"
        yield Chart(each.title, each.histogram, report.unit, report.max_length if is_whole else None, is_whole)


def _cost(cost: CostReport) -> Iterable[Block]:
    bars = [("packed here", cost.packed), ("no padding, prompt in each text", cost.separate)]
    if cost.pads:
        bars = [("padded here, like lengths together", cost.packed), ("no padding", cost.separate)]
    bars.append(("padded to the longest of 8 pairs", cost.padded_batch))
    if cost.padded_max is not None:
        bars.append(("padded to data.max_length", cost.padded_max))
    yield Bars(tuple(Bar(name, value, f"{value:,} ({value / max(1, cost.packed):.2f}x)") for name, value in bars))
    if not cost.pads and cost.separate:
        yield f"Sharing prompts saves {percent(1 - cost.packed / cost.separate)} of the {cost.unit} by itself."
    if cost.pads:
        yield "This model reads both ways, so prompts cannot be shared and its texts are padded."
    if cost.micro_batches is not None:
        yield (
            f"An optimizer step takes about {cost.micro_batches:,.1f} micro-batches of at most {cost.token_budget:,} "
            "tokens on one process."
        )


def _longer(reports: Sequence[LongerReport]) -> Figures:
    figures = []
    for each in reports:
        text = "no pair with different lengths" if each.share is None else f"{each.share:.1%}"
        figures.append(
            Figure(
                f"longer in {each.unit} is chosen",
                text,
                f"{each.longer_chosen:,} longer, {each.shorter_chosen:,} shorter; {each.ties:,} ties are not counted",
            )
        )
    return Figures(tuple(figures))


def _findings(findings: Sequence[Finding]) -> Figures:
    return Figures(
        tuple(Figure(each.title, _value(each), each.why, each.examples, each.count > 0) for each in findings)
    )


def _suspicious(side: SideReport) -> Block:
    found = [each for each in side.suspicious if each.count]
    if not found:
        return "None of the checks found anything: " + "; ".join(each.title for each in side.suspicious) + "."
    return _findings(found)


def _value(finding: Finding) -> str:
    return f"{finding.count:,} ({percent(finding.share)})" if finding.count else "none"


def _overlap(report: Report) -> Section:
    return Section(
        "Training against validation",
        "Validation pairs that training knows already measure memory, not judgement.",
        (_findings(report.overlap),),
    )


def _baselines(report: BaselineReport) -> Section:
    blocks: list[Block] = []
    if report.baselines:
        bars = [
            Bar(
                f"{each.title}, {each.on}",
                each.accuracy,
                f"{each.accuracy:.3f} +-{each.standard_error:.3f}",
                each.standard_error,
            )
            for each in report.baselines
        ]
        blocks.append(Bars(tuple(bars), start=0.4, end=1.0, mark=(0.5, "a coin")))
        rules = {each.title: each.why for each in report.baselines}
        blocks += [f"{title[0].upper()}{title[1:]}: {why}." for title, why in rules.items()]
        blocks.append("On training: learned from four fifths of the pairs, asked about the rest, five times over.")
        if any(each.on == "validation" for each in report.baselines):
            blocks.append("On validation: learned from training pairs.")
        blocks.append("+- is one standard error.")
    blocks += [f"{note[0].upper()}{note[1:]}." for note in report.notes]
    return Section(
        "What a reward model has to beat",
        "Share of pairs that simple rules get right without understanding anything.",
        tuple(blocks),
    )


def _samples(side: SideReport, unit: str) -> Section:
    what = "tokens of the template are marked" if unit == "tokens" else "chats are shown as role: content"
    return Section(
        f"Rows of {side.name} as the model sees them",
        f"Drawn at random; what all responses share stands first, in {unit}; {what}.",
        (Samples(side.samples, unit),),
    )


def with_short_names(report: Report) -> Report:
    """The same report; paths stay whole when two files have the same name, and in the list of files."""
    files = sorted({file for side in report.sides for file in side.files}, key=len, reverse=True)
    names = {file: os.path.basename(file) for file in files}
    if len(set(names.values())) < len(files):
        return report

    def short(place: str) -> str:
        for file, name in names.items():
            place = place.replace(f"{file}:", f"{name}:")
        return place

    def findings(found: Sequence[Finding]) -> tuple[Finding, ...]:
        return tuple(replace(each, examples=tuple(map(short, each.examples))) for each in found)

    def of_side(side: SideReport) -> SideReport:
        return replace(
            side,
            dropped=findings(side.dropped),
            duplicates=findings(side.duplicates),
            suspicious=findings(side.suspicious),
            lengths=replace(side.lengths, examples=tuple(map(short, side.lengths.examples))),
            samples=tuple(replace(each, where=short(each.where)) for each in side.samples),
        )

    return replace(report, sides=tuple(map(of_side, report.sides)), overlap=findings(report.overlap))


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
