"""The page: the report as text, in sections of a few kinds of blocks, which terminal and HTML render.

`as_dict` is the same report for programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import Any, ClassVar, TypeAlias

from rm_gallery.inspection.baselines import BaselineReport
from rm_gallery.inspection.findings import Finding
from rm_gallery.inspection.lengths import (
    CostReport,
    Distribution,
    Histogram,
    LengthBias,
    LengthReport,
    LongTexts,
    SourceReport,
)
from rm_gallery.inspection.report import Message, Report, Sample, SplitReport, percent
from rm_gallery.inspection.texts import ExampleText


@dataclass(frozen=True)
class Figure:
    """One line: label, value, explanation."""

    label: str
    value: str
    why: str = ""
    examples: tuple[str, ...] = ()
    is_hit: bool = False
    """Highlighted."""
    texts: tuple[ExampleText, ...] = ()
    """Of the examples; in HTML only."""


@dataclass(frozen=True)
class Figures:
    """Lines of label and value."""

    kind: ClassVar[str] = "figures"
    rows: tuple[Figure, ...]


@dataclass(frozen=True)
class Table:
    """A table of numbers; the first column is text."""

    kind: ClassVar[str] = "table"
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    text: str
    error: float = 0.0
    """Half width of the error bar; 0 for none."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale."""

    kind: ClassVar[str] = "bars"
    bars: tuple[Bar, ...]
    start: float = 0.0
    end: float | None = None
    """None: the largest value."""
    mark: tuple[float, str] | None = None
    """Value and label of a reference line."""

    def position(self, value: float) -> float:
        """0 to 1 along the scale."""
        end = self.end if self.end is not None else max(bar.value for bar in self.bars) or 1.0
        return max(0.0, min(1.0, (value - self.start) / (end - self.start)))


@dataclass(frozen=True)
class Chart:
    """A histogram."""

    kind: ClassVar[str] = "chart"
    title: str
    histogram: Histogram
    unit: str
    thing: str
    """What is counted: `rows` or `pairs`."""
    most: int
    """Count that the y axis includes; charts with the same one can be compared."""
    limit: int | None = None
    """`data.max_length`, where it applies."""
    is_main: bool = False
    """Whether the terminal shows it."""

    def y_ticks(self) -> tuple[int, ...]:
        """From 0 in equal round steps, at most 5, to at least `most`.

        Example: 0, 500, 1000, 1500 for 1317.
        """
        step = next(step for scale in count() for step in (10**scale, 2 * 10**scale, 5 * 10**scale)
                    if 4 * step >= self.most)  # fmt: skip
        return tuple(range(0, self.most + step, step))

    def x_ticks(self) -> tuple[tuple[float, str], ...]:
        """Position from 0 to 1 and label of at most 4 bin edges, the first and the last bin's among them."""
        edges = self.histogram.edges
        places = sorted({round(part * (len(edges) - 1) / 3) for part in range(4)})
        return tuple((place / len(edges), f"{edges[place]:,}{'+' * (place == len(edges) - 1)}") for place in places)

    def bins(self) -> Iterator[tuple[str, int, bool]]:
        """Range, count, and whether the bin lies beyond the limit."""
        edges = self.histogram.edges
        ends = [f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)]
        labels = [*ends, f"{edges[-1]:,} and more"]
        for label, low, number in zip(labels, edges, self.histogram.counts, strict=True):
            yield label, number, self.limit is not None and low > self.limit


@dataclass(frozen=True)
class Samples:
    """Groups as text."""

    kind: ClassVar[str] = "samples"
    samples: tuple[Sample, ...]
    unit: str


@dataclass(frozen=True)
class Note:
    """A sentence."""

    kind: ClassVar[str] = "note"
    text: str


Block: TypeAlias = Figures | Table | Bars | Chart | Samples | Note


@dataclass(frozen=True)
class Section:
    """A title, a sentence on what it shows, and the blocks."""

    title: str
    why: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    lead: tuple[str, ...]
    summary: tuple[Message, ...]
    sections: tuple[Section, ...]
    report: Any
    """The figures, a dataclass."""
    about: tuple[tuple[str, str], ...] = ()
    """Label and value: when, with what command and by which version the report was made."""

    def as_dict(self) -> dict[str, Any]:
        """Every figure as plain values, for JSON."""
        return asdict(self.report)


def page_of(report: Report, about: Sequence[tuple[str, str]] = ()) -> Page:
    """The report in words. about: as in `Page`."""
    train, unit = report.splits[0], report.unit.capitalize()
    sections = [
        *_data_sections(train),
        Section(
            f"{unit} per epoch",
            f"{unit} that the model computes, by batching method.",
            tuple(cost_blocks(train.cost)),
        ),
        Section(
            "Length bias", "Far from 50%, a model can score well on length alone.", _length_bias(train.length_bias)
        ),
        _baselines(report.baselines),
    ]
    if len(report.splits) > 1:
        why = "Validation pairs that overlap with the training data measure memorization."
        sections.append(Section("Train/validation leakage", why, (finding_figures(report.leakage),)))
    sections += _quality_sections(train)
    for split in report.splits[1:]:
        sections += [*_data_sections(split), *_quality_sections(split)]
    sections += [_samples(split, report.unit) for split in report.splits if split.samples]
    return Page("Preference data report", tuple(_lead(report)), report.summary, tuple(sections), report, tuple(about))


def _lead(report: Report) -> Iterator[str]:
    for split in report.splits:
        more = f" and {len(split.files) - 3} more" if len(split.files) > 3 else ""
        files = f"{', '.join(split.files[:3])}{more}"
        yield f"{split.name}: {split.num_pairs:,} pairs in {split.num_groups:,} rows of {files}"
    if report.unit == "tokens":
        yield f"lengths in tokens (tokenizer and chat template of {report.tokenizer})"
    else:
        yield "lengths in words, without chat template (set model.partial_pretrain=FOLDER for tokens)"


def _data_sections(split: SplitReport) -> Iterator[Section]:
    name = split.name.capitalize()
    yield Section(f"{name} rows", "Rows read, used and dropped.", (_rows(split),))
    if len(split.sources) > 1:
        why = f"Length bias, median length of the responses in {split.lengths.unit}, and pairs with a suspicious match."
        yield Section(f"{name} sources", why, (_sources(split.sources),))
    yield Section(
        f"{name} lengths",
        f"In {split.lengths.unit}. The common prefix of a row's responses, mostly its prompt, is computed once.",
        tuple(_lengths(split.lengths)),
    )


def _quality_sections(split: SplitReport) -> Iterator[Section]:
    name = split.name.capitalize()
    yield Section(f"{name} duplicates", "Repeated and contradictory pairs.", (finding_figures(split.duplicates),))
    why = "Heuristics on single pairs; a match is not necessarily a mistake."
    hits = [each for each in split.suspicious if each.count]
    none = Note("No matches. Checks: " + "; ".join(each.title for each in split.suspicious) + ".")
    yield Section(f"{name} suspicious pairs", why, (finding_figures(hits) if hits else none,))


def _rows(split: SplitReport) -> Figures:
    if split.num_prompts == 1:
        prompts = "all rows have the same prompt, or none"
    else:
        prompts = f"the most frequent one has {percent(split.prompt_share)} of the rows"
    figures = [
        Figure("rows read", f"{split.num_rows:,}"),
        Figure("rows used", f"{split.num_groups:,}", f"input style: {' and '.join(sorted(split.styles))}"),
        Figure("pairs", f"{split.num_pairs:,}", "comparisons of two responses; a ranking of K gives several"),
        Figure("distinct prompts", f"{split.num_prompts:,}", prompts),
    ]
    return Figures((*figures, *dropped_figures(split.dropped)))


def dropped_figures(dropped: Sequence[Finding]) -> Iterator[Figure]:
    """A line for each reason."""
    for each in dropped:
        yield Figure(f"dropped: {each.title}", _count(each), "", each.examples, True, each.texts)


def _sources(sources: Sequence[SourceReport]) -> Table:
    rows = []
    for each in sources:
        longer = "-" if each.longer_chosen is None else f"{each.longer_chosen:.2f}"
        medians = f"{each.chosen_length:,}", f"{each.rejected_length:,}"
        flagged = f"{each.flagged:,} ({percent(each.flagged / each.pairs)})" if each.flagged else "none"
        rows.append((each.name, f"{each.pairs:,}", percent(each.share), longer, *medians, flagged))
    return Table(("source", "pairs", "share", "longer chosen", "chosen p50", "rejected p50", "suspicious"), tuple(rows))


_LONG_TEXTS: dict[LongTexts, str] = {
    "dropped": "dropped (data.filter_overlong_prompts=true)",
    "truncated": "truncated (data.truncation), which may remove the end of a response or the question",
    "refused": "training stops at the first one (data.truncation=error)",
}


def _lengths(report: LengthReport) -> Iterator[Block]:
    if report.max_length is not None:
        share = report.num_beyond / report.num_encoded if report.num_encoded else 0.0
        label, value = (
            f"rows longer than data.max_length={report.max_length:,}",
            f"{report.num_beyond:,} ({percent(share)})",
        )
        why = _LONG_TEXTS[report.long_texts]
        yield Figures((Figure(label, value, why, report.examples, report.num_beyond > 0),))
    yield percentiles(report.distributions, report.unit)
    counts = {each.key: max(each.histogram.counts) for each in report.distributions}
    counts["chosen"] = counts["rejected"] = max(counts["chosen"], counts["rejected"])
    for each in report.distributions:
        is_whole = each.key == "whole"
        thing = "pairs" if each.key in ("chosen", "rejected") else "rows"
        limit = report.max_length if is_whole else None
        yield Chart(each.title, each.histogram, report.unit, thing, counts[each.key], limit, is_whole)


def percentiles(distributions: Sequence[Distribution], unit: str) -> Table:
    """A row of percentiles for each distribution."""
    rows = []
    for each in distributions:
        points = (each.min, each.p50, each.p90, each.p99, each.max)
        rows.append((each.title, *(f"{point:,}" for point in points), f"{each.mean:,.1f}"))
    return Table((unit, "min", "p50", "p90", "p99", "max", "mean"), tuple(rows))


def cost_blocks(cost: CostReport, thing: str = "pairs") -> Iterator[Block]:
    """The tokens of an epoch by batching method. thing: what a padded batch has 8 of."""
    best = cost.packed if cost.shared is None else cost.shared
    bars = [("padding-free, prefix shared", cost.packed), ("padding-free", cost.separate)]
    if cost.separate == cost.packed:  # conversations: rows of one text
        bars = bars[1:]
    if cost.pads:
        bars = [("padded, sorted by length", cost.packed), ("without padding", cost.separate)]
    if cost.shared is not None:
        bars.insert(0, ("packed, prompts shared", cost.shared))
    bars.append((f"padded batches of 8 {thing}", cost.padded_batch))
    if cost.padded_max is not None:
        bars.append(("padded to data.max_length", cost.padded_max))
    yield Bars(tuple(Bar(name, value, f"{value:,} ({value / max(1, best):.2f}x)") for name, value in bars))
    if cost.pads:
        yield Note("Training uses the first one: attention of this model is bidirectional, so no prefix can be shared.")
    elif cost.separate == cost.packed:
        yield Note("Training uses the first one.")
    elif cost.separate:
        saved = percent(1 - cost.packed / cost.separate)
        yield Note(f"Training uses the first one. Sharing the prefix of a row saves {saved} of the {cost.unit}.")
    if cost.micro_batches is not None and cost.fill is not None:
        yield Note(
            f"On one rank, an optimizer step has {cost.micro_batches:,.1f} micro-batches of at most "
            f"{cost.token_budget:,} tokens, {percent(cost.fill)} full on average."
        )


def _length_bias(reports: Sequence[LengthBias]) -> tuple[Figures]:
    figures = []
    for each in reports:
        value = "no pair with different lengths" if each.share is None else f"{each.share:.1%}"
        why = f"{each.longer_chosen:,} longer, {each.shorter_chosen:,} shorter; {each.ties:,} ties excluded"
        figures.append(Figure(f"longer response chosen, by {each.unit}", value, why))
    return (Figures(tuple(figures)),)


def finding_figures(findings: Sequence[Finding]) -> Figures:
    """A line for each finding, those without a match too."""
    return Figures(
        tuple(
            Figure(each.title, _count(each), each.why if each.count else "", each.examples, each.count > 0, each.texts)
            for each in findings
        )
    )


def _count(finding: Finding) -> str:
    return f"{finding.count:,} ({percent(finding.share)})" if finding.count else "none"


def _baselines(report: BaselineReport) -> Section:
    blocks: list[Block] = []
    if report.baselines:
        bars = []
        for each in report.baselines:
            text = f"{each.accuracy:.3f} +-{each.standard_error:.3f}"
            bars.append(Bar(f"{each.title}, {each.on}", each.accuracy, text, each.standard_error))
        start = min(4, *(int(10 * bar.value) for bar in bars)) / 10
        blocks.append(Bars(tuple(bars), start=start, end=1.0, mark=(0.5, "chance")))
        rules = {each.title: each.why for each in report.baselines}
        blocks += [Note(f"{title.capitalize()}: {why}.") for title, why in rules.items()]
        validation = any(each.on == "validation" for each in report.baselines)
        on_val = " Validation: fitted on training pairs." if validation else ""
        blocks.append(Note(f"+- is one standard error.{on_val}"))
    blocks += [Note(f"{note[0].upper()}{note[1:]}.") for note in report.notes]
    return Section("Baselines", "Pairwise accuracy of simple rules, which a reward model should exceed.", tuple(blocks))


def _samples(split: SplitReport, unit: str) -> Section:
    how = "special tokens are marked" if unit == "tokens" else "messages are shown as role: content"
    return Section(
        f"{split.name.capitalize()} samples",
        f"Random rows as the model sees them, in {unit}; {how}.",
        (Samples(split.samples, unit),),
    )
