"""The report: every figure about the data as plain records, from which terminal, HTML and JSON are made.

With them go samples, a few groups as the model sees them, in pieces, with the common prefix apart; and verdicts, what
to look at first, as sentences, the most important ones on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rm_gallery.data.batching.plan import PackingConfig
from rm_gallery.data.tokenization.token_group import split_prefix
from rm_gallery.errors import BadRow
from rm_gallery.inspection.baselines import Baseline, BaselineReport, baseline_report
from rm_gallery.inspection.collect import Survey
from rm_gallery.inspection.duplicates import CONSTANT_SHARE, duplicate_findings, overlap_findings
from rm_gallery.inspection.findings import Finding, dropped_findings, find
from rm_gallery.inspection.lengths import (
    CostReport,
    LengthReport,
    LongerReport,
    LongTexts,
    SourceReport,
    cost_report,
    length_report,
    longer_report,
    source_reports,
)
from rm_gallery.inspection.suspicious import suspicious_findings
from rm_gallery.inspection.views import Encoder, Piece
from rm_gallery.schema import PreferenceGroup


@dataclass(frozen=True)
class SideReport:
    """Training or validation."""

    name: str
    files: tuple[str, ...]
    num_rows: int
    """Rows that were read, those that cannot be used included."""
    num_groups: int
    num_pairs: int
    num_prompts: int
    prompt_share: float
    """Share of rows that have the most frequent prompt."""
    styles: dict[str, int]
    sources: tuple[SourceReport, ...]
    dropped: tuple[Finding, ...]
    duplicates: tuple[Finding, ...]
    suspicious: tuple[Finding, ...]
    lengths: LengthReport
    cost: CostReport
    longer: tuple[LongerReport, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Report:
    """All that show-data shows."""

    unit: str
    """What lengths are counted in: `tokens` or `words`."""
    tokenizer: str
    """Where the tokenizer came from; '' when there is none."""
    sides: tuple[SideReport, ...]
    overlap: tuple[Finding, ...]
    baselines: BaselineReport

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ReportOptions:
    """What the report takes from the configuration."""

    packing: PackingConfig
    token_budget: int | None
    """Of a micro-batch; None when lengths are not tokens."""
    seed: int
    pads: bool
    """Whether the model is one that pads (an encoder)."""
    tokenizer: str
    long_texts: LongTexts


def build_report(surveys: Sequence[Survey], encoder: Encoder, options: ReportOptions) -> Report:
    """Work everything out; the training side first, then validation if there is one."""
    train = surveys[0]
    val = surveys[1] if len(surveys) > 1 else None
    return Report(
        unit=encoder.unit,
        tokenizer=options.tokenizer,
        sides=tuple(_side(each, encoder, options) for each in surveys),
        overlap=tuple(overlap_findings(train.table, val.table)) if val else (),
        baselines=baseline_report(train.pairs, val.pairs if val else None, seed=options.seed),
    )


def _side(survey: Survey, encoder: Encoder, options: ReportOptions) -> SideReport:
    table, lengths, side = survey.table, survey.lengths, survey.side
    longer = [longer_report(table, table.chars, unit="characters")]
    longer.append(longer_report(table, lengths.tails, unit=encoder.unit))
    return SideReport(
        name=side.name,
        files=side.files,
        num_rows=table.num_groups + side.dropped.total,
        num_groups=table.num_groups,
        num_pairs=table.num_pairs,
        num_prompts=len(np.unique(table.prompt)),
        prompt_share=table.prompt_share(),
        styles=table.styles,
        sources=tuple(source_reports(table)),
        dropped=tuple(dropped_findings(side.dropped, table.num_groups)),
        duplicates=tuple(duplicate_findings(table)),
        suspicious=tuple(suspicious_findings(table)),
        lengths=length_report(
            lengths, table, unit=encoder.unit, max_length=encoder.max_length, long_texts=options.long_texts
        ),
        cost=cost_report(
            lengths,
            table,
            unit=encoder.unit,
            max_length=encoder.max_length,
            packing=options.packing,
            token_budget=options.token_budget,
            seed=options.seed,
            pads=options.pads,
        ),
        longer=tuple(longer),
        samples=tuple(make_sample(group, encoder) for group in survey.shown),
    )


HEAD_PIECES = 90
TAIL_PIECES = 40
MAX_RESPONSES = 8


@dataclass(frozen=True)
class Stretch:
    """The common prefix, or what one response has behind it."""

    label: str
    length: int
    """In tokens or words, all of it."""
    head: tuple[Piece, ...]
    tail: tuple[Piece, ...]
    """The end of a long stretch; what lies between head and tail is not shown."""
    num_hidden: int


@dataclass(frozen=True)
class Sample:
    """One group."""

    where: str
    source: str
    prefix: Stretch
    responses: tuple[Stretch, ...]
    num_hidden_responses: int


def make_sample(group: PreferenceGroup, encoder: Encoder) -> Sample:
    """Pieces of a group that `measure` has kept."""
    texts = encoder.encode([group])[0]
    assert not isinstance(texts, BadRow), "it was kept"
    split = split_prefix(*encoder.fit(texts, group))
    labels = _labels(group)[:MAX_RESPONSES]
    tails = split.tails[:MAX_RESPONSES]
    return Sample(
        group.where,
        group.source,
        _stretch("both" if len(group.responses) == 2 else "all", split.prefix.tolist(), group, encoder),
        tuple(_stretch(label, tail.tolist(), group, encoder) for label, tail in zip(labels, tails, strict=True)),
        len(split.tails) - len(tails),
    )


def _labels(group: PreferenceGroup) -> list[str]:
    """chosen and rejected for a pair; `response 1` and so on with their wins for more."""
    if len(group.responses) == 2 and len(group.comparisons) == 1:
        return ["chosen" if index == group.comparisons[0].better else "rejected" for index in range(2)]
    wins = [sum(each.better == index for each in group.comparisons) for index in range(len(group.responses))]
    losses = [sum(each.worse == index for each in group.comparisons) for index in range(len(group.responses))]
    return [f"response {index + 1}, +{wins[index]} -{losses[index]}" for index in range(len(group.responses))]


def _stretch(label: str, ids: Sequence[int], group: PreferenceGroup, encoder: Encoder) -> Stretch:
    if len(ids) <= HEAD_PIECES + TAIL_PIECES:
        return Stretch(label, len(ids), tuple(encoder.pieces(ids, group)), (), 0)
    head, tail = ids[:HEAD_PIECES], ids[-TAIL_PIECES:]
    return Stretch(
        label,
        len(ids),
        tuple(encoder.pieces(head, group)),
        tuple(encoder.pieces(tail, group)),
        len(ids) - HEAD_PIECES - TAIL_PIECES,
    )


Level = Literal["act", "know", "good"]
ORDER: tuple[Level, ...] = ("act", "know", "good")


@dataclass(frozen=True)
class Verdict:
    """`act`: mend it before training; `know`: keep it in mind; `good`: nothing to do."""

    level: Level
    text: str


def verdicts(report: Report) -> list[Verdict]:
    """At least one; those to act on first."""
    found = [each for side in report.sides for each in _of_side(side)]
    found += _of_overlap(report)
    found += _of_baselines(report)
    if not any(each.level == "act" for each in found):
        found.append(Verdict("good", "Nothing here has to be mended before training."))
    return sorted(found, key=lambda each: ORDER.index(each.level))


def percent(share: float) -> str:
    """`0.4%`, `12%`; a share that is not zero never reads 0, one below the whole never 100."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    if share > 0.999:
        return ">99.9%"
    return f"{share:.1%}" if share < 0.1 or share > 0.99 else f"{share:.0%}"


def _of_side(side: SideReport) -> Iterator[Verdict]:
    yield from _of_reading(side)
    repeated, opposed, near = (
        find(side.duplicates, key) for key in ("repeated_pairs", "contradictions", "near_duplicates")
    )
    if opposed and opposed.count:
        level: Level = "act" if opposed.share > 0.001 else "know"
        yield Verdict(level, f"Contradictory labels: {_count(opposed, 'pair')} of {side.name}{_first(opposed)}.")
    if repeated and repeated.share > 0.01:
        yield Verdict("act", f"{percent(repeated.share)} of the {side.name} pairs are exact copies{_first(repeated)}.")
    elif repeated and repeated.count:
        yield Verdict("know", f"Exact copies: {_count(repeated, 'pair')} of {side.name}{_first(repeated)}.")
    if near and near.share > 0.02:
        yield Verdict("know", f"{percent(near.share)} of the {side.name} rows nearly repeat another{_first(near)}.")
    for key, what in (
        ("p_below_half", "Labelled against what most people preferred"),
        ("negative_margin", "Negative margins"),
        ("same_words", "Both responses with the same letters and digits"),
        ("no_words", "A response without a word"),
    ):
        suspicious = find(side.suspicious, key)
        if suspicious and suspicious.count:
            level = "act" if suspicious.share > 0.005 and suspicious.count >= 10 else "know"
            yield Verdict(level, f"{what}: {_count(suspicious, 'pair')} of {side.name}{_first(suspicious)}.")
    yield from _of_cuts(side)
    if side.name == "training":
        yield from _of_length(side)


def _of_reading(side: SideReport) -> Iterator[Verdict]:
    dropped = sum(each.count for each in side.dropped)
    if dropped:
        share = dropped / side.num_rows
        most = side.dropped[0]
        yield Verdict(
            "act" if share > 0.01 else "know",
            f"{dropped:,} of {side.num_rows:,} {side.name} rows ({percent(share)}) are left out; "
            f"most often: {most.title} (first: {most.examples[0]}).",
        )
    if len(side.styles) > 1:
        yield Verdict("act", f"The {side.name} files mix chats with bare texts; training refuses that.")
    lengths = side.lengths
    if lengths.num_beyond and lengths.long_texts != "left out":
        does = "are cut to" if lengths.long_texts == "cut" else "stop training: they are longer than"
        rows = f"{lengths.num_beyond:,} {side.name} rows ({percent(lengths.num_beyond / lengths.num_encoded)})"
        level: Level = "act" if lengths.long_texts == "refused" or lengths.num_beyond > 0.01 * side.num_rows else "know"
        yield Verdict(level, f"{rows} {does} data.max_length={lengths.max_length}{_first(lengths)}.")
    if side.num_prompts > 1 and side.prompt_share > CONSTANT_SHARE:
        yield Verdict("know", f"One prompt stands in {percent(side.prompt_share)} of the {side.name} rows.")


def _of_cuts(side: SideReport) -> Iterator[Verdict]:
    chosen, rejected = find(side.suspicious, "chosen_cut"), find(side.suspicious, "rejected_cut")
    if not chosen or not rejected:
        return
    more, less = max(chosen.share, rejected.share), min(chosen.share, rejected.share)
    if max(chosen.count, rejected.count) >= 20 and more > 1.5 * less + 0.01:
        yield Verdict(
            "know",
            f"In {side.name}, {percent(chosen.share)} of the chosen but {percent(rejected.share)} of the rejected "
            "responses end in mid-sentence: a model can learn to spot that instead of quality.",
        )


def _of_length(side: SideReport) -> Iterator[Verdict]:
    share = side.longer[0].share
    if share is not None and side.num_pairs >= 100 and abs(share - 0.5) > 0.1:
        which = "longer" if share > 0.5 else "shorter"
        yield Verdict(
            "know",
            f"The {which} response is the chosen one in {percent(max(share, 1 - share))} of the pairs: report accuracy "
            "on pairs of like length as well.",
        )
    cost = side.cost
    if cost.packed:
        times = cost.padded_batch / cost.packed
        yield Verdict(
            "good", f"Packing computes {times:.1f} times fewer {cost.unit} than batches padded to their longest."
        )


def _of_overlap(report: Report) -> Iterator[Verdict]:
    for key, what, limit in (
        ("flipped_pairs", "stand in training with the labels flipped", 0.0),
        ("shared_pairs", "stand in training as they are", 0.0),
        ("shared_prompts", "have a prompt that training has too: validation will look better than it is", 0.01),
    ):
        finding = find(report.overlap, key)
        if finding and finding.count:
            level: Level = "act" if finding.share > limit else "know"
            yield Verdict(level, f"{percent(finding.share)} of the validation pairs {what}{_first(finding)}.")
    near = find(report.overlap, "near_shared")
    if near and near.share > 0.01:
        yield Verdict(
            "act", f"{percent(near.share)} of the validation rows nearly repeat a training row{_first(near)}."
        )
    styles = {style for side in report.sides for style in side.styles}
    if len(styles) > 1 and all(len(side.styles) == 1 for side in report.sides):
        yield Verdict(
            "act", "Training and validation files hold different kinds (chats, bare texts); training refuses that."
        )


def _of_baselines(report: Report) -> Iterator[Verdict]:
    on_val = [each for each in report.baselines.baselines if each.on == "validation"]
    best: Baseline | None = max(on_val or report.baselines.baselines, key=lambda each: each.accuracy, default=None)
    if best is not None:
        yield Verdict(
            "know",
            f"A reward model has to beat {best.accuracy:.3f} (standard error {best.standard_error:.3f}): "
            f"that is the accuracy of {best.title} on {best.on} pairs.",
        )


def _count(finding: Finding, thing: str) -> str:
    return f"{finding.count:,} {thing}{'' if finding.count == 1 else 's'} ({percent(finding.share)})"


def _first(finding: Finding | LengthReport) -> str:
    return f" (first: {finding.examples[0]})" if finding.examples else ""
