"""The report: every figure about the data as plain records, and a summary ordered by importance.

Terminal, HTML and JSON are made from it; see page.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.config import DataConfig, mixture_of
from rm_gallery.inspection.baselines import CONSTANT_SHARE, BaselineReport, baseline_report
from rm_gallery.inspection.collect import Split
from rm_gallery.inspection.duplicates import duplicate_findings, leakage_findings
from rm_gallery.inspection.findings import Finding, dropped_findings, find, suspicious_findings
from rm_gallery.inspection.lengths import (
    CostReport,
    LengthBias,
    LengthReport,
    LongTexts,
    SourceReport,
    cost_report,
    length_bias,
    length_report,
    source_reports,
)
from rm_gallery.inspection.texts import MAX_RESPONSES, Piece, labels_of
from rm_gallery.schema import PreferenceGroup


@dataclass(frozen=True)
class SplitReport:
    """Training or validation data."""

    name: str
    files: tuple[str, ...]
    num_rows: int
    """Rows read, dropped ones included."""
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
    length_bias: tuple[LengthBias, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Report:
    """All figures, and a summary of the most important ones."""

    unit: str
    """Unit of lengths: `tokens` or `words`."""
    tokenizer: str
    """Path of the tokenizer; '' without one."""
    splits: tuple[SplitReport, ...]
    leakage: tuple[Finding, ...]
    baselines: BaselineReport
    summary: tuple[Message, ...]


def build_report(
    splits: Sequence[Split], config: DataConfig, packer: Packer | None, *, model: str, seed: int
) -> Report:
    """The figures of the training split and, if there is one, the validation split.

    packer: how training packs micro-batches on one rank; None without a model.
    """
    train, val = splits[0], splits[1] if len(splits) > 1 else None
    reports = tuple(_split_report(split, config, packer, seed=seed) for split in splits)
    leakage = tuple(leakage_findings(train, val)) if val else ()
    baselines = baseline_report(train.pairs, val.pairs if val else None, seed=seed)
    summary = tuple(summarize(reports, leakage, baselines))
    return Report(train.encoder.unit, model, reports, leakage, baselines, summary)


def _split_report(split: Split, config: DataConfig, packer: Packer | None, *, seed: int) -> SplitReport:
    unit = split.encoder.unit
    return SplitReport(
        name=split.name,
        files=tuple(file.name for file in split.files),
        num_rows=split.num_groups + split.dropped.total,
        num_groups=split.num_groups,
        num_pairs=split.num_pairs,
        num_prompts=len(np.unique(split.prompt)),
        prompt_share=split.prompt_share(),
        styles=split.styles,
        sources=tuple(source_reports(split)),
        dropped=tuple(dropped_findings(split.dropped, split.num_groups, split.dropped_texts)),
        duplicates=tuple(duplicate_findings(split)),
        suspicious=tuple(suspicious_findings(split.flags, split.text_of_pair)),
        lengths=length_report(split, long_texts=_long_texts(config)),
        cost=cost_report(
            split.data, config, packer, unit=unit, max_length=split.encoder.max_length, seed=seed,
            mixture=mixture_of(split.data, split.files, config) if split.name == "training" else None,
        ),
        length_bias=(
            length_bias(split, split.chars, unit="characters"),
            length_bias(split, split.data.tail_lengths, unit=unit),
        ),
        samples=tuple(make_sample(split, index, group) for index, group in split.samples),
    )  # fmt: skip


def _long_texts(config: DataConfig) -> LongTexts:
    if config.filter_overlong_prompts:
        return "dropped"
    return "refused" if config.truncation == "error" else "truncated"


HEAD_PIECES = 90
TAIL_PIECES = 40


@dataclass(frozen=True)
class Segment:
    """The common prefix of a group's responses, or the rest of one response."""

    label: str
    length: int
    """In tokens or words, hidden ones included."""
    head: tuple[Piece, ...]
    tail: tuple[Piece, ...]
    """End of a long segment; what lies between head and tail is hidden."""
    num_hidden: int


@dataclass(frozen=True)
class Sample:
    """One group as the model sees it."""

    where: str
    source: str
    prefix: Segment
    responses: tuple[Segment, ...]
    num_hidden_responses: int


def make_sample(split: Split, index: int, group: PreferenceGroup) -> Sample:
    """The pieces of the group with this index."""
    tokens = split.data[index]
    labels = labels_of(group)[:MAX_RESPONSES]
    tails = tokens.tails[:MAX_RESPONSES]
    pieces = partial(split.encoder.pieces, group=group)
    return Sample(
        split.where(index),
        split.data.sources[int(split.data.source_numbers[index])],
        make_segment("shared prefix", tokens.prefix.tolist(), pieces),
        tuple(make_segment(label, tail.tolist(), pieces) for label, tail in zip(labels, tails, strict=True)),
        len(tokens.tails) - len(tails),
    )


def make_segment(label: str, ids: Sequence[int], pieces: Callable[[Sequence[int]], Sequence[Piece]]) -> Segment:
    """pieces: of some ids."""
    if len(ids) <= HEAD_PIECES + TAIL_PIECES:
        return Segment(label, len(ids), tuple(pieces(ids)), (), 0)
    head, tail = ids[:HEAD_PIECES], ids[-TAIL_PIECES:]
    hidden = len(ids) - len(head) - len(tail)
    return Segment(label, len(ids), tuple(pieces(head)), tuple(pieces(tail)), hidden)


Level = Literal["error", "warning", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "ok")


@dataclass(frozen=True)
class Message:
    """A line of the summary. `error`: fix before training; `warning`: consider; `ok`: nothing to do."""

    level: Level
    text: str


def summarize(splits: Sequence[SplitReport], leakage: Sequence[Finding], baselines: BaselineReport) -> list[Message]:
    """At least one message, errors first."""
    found = [message for split in splits for message in _of_split(split)]
    found += _of_leakage(splits, leakage)
    found += _of_baselines(baselines)
    if not any(each.level == "error" for each in found):
        found.append(Message("ok", "No errors found."))
    return sorted(found, key=lambda each: LEVELS.index(each.level))


def percent(share: float) -> str:
    """`0.4%`, `12%`; 0% and 100% only if exact."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    if share > 0.999:
        return ">99.9%"
    return f"{share:.1%}" if share < 0.1 or share > 0.99 else f"{share:.0%}"


# key of a finding -> share above which it is a warning, share above which it is an error, fewest pairs of an error
_LIMITS = {
    "contradictions": (0.0, 0.001, 1),
    "repeated_pairs": (0.0, 0.01, 1),
    "near_duplicates": (0.02, 1.0, 1),
    "p_below_half": (0.0, 0.005, 10),
    "negative_margin": (0.0, 0.005, 10),
    "same_words": (0.0, 0.005, 10),
    "no_words": (0.0, 0.005, 10),
    "flipped_pairs": (0.0, 0.0, 1),
    "shared_pairs": (0.0, 0.0, 1),
    "shared_prompts": (0.0, 0.01, 1),
    "near_shared": (0.01, 0.01, 1),
}


def _of_findings(findings: Sequence[Finding], split: str, prefix: str = "") -> Iterator[Message]:
    """`Exact duplicates: 3 training pairs (2.4%); first: train.parquet:0 = train.parquet:120.`"""
    for key, (warning, error, min_count) in _LIMITS.items():
        finding = find(findings, key)
        if finding is None or finding.share <= warning:
            continue
        level: Level = "error" if finding.share > error and finding.count >= min_count else "warning"
        title = f"{prefix}{finding.title}"
        text = f"{title[0].upper()}{title[1:]}: {_rows_of(split, finding.count, finding.share, finding.thing)}"
        yield Message(level, f"{text}{_first(finding.examples)}.")


def _rows_of(split: str, count: int, share: float, thing: str) -> str:
    return f"{count:,} {split} {thing}{'' if count == 1 else 's'} ({percent(share)})"


def _first(examples: Sequence[str]) -> str:
    return f"; first: {examples[0]}" if examples else ""


def _of_split(split: SplitReport) -> Iterator[Message]:
    yield from _of_rows(split)
    yield from _of_findings([*split.duplicates, *split.suspicious], split.name)
    yield from _of_truncation(split)
    if split.name == "training":
        yield from _of_lengths(split)


def of_dropped(dropped: Sequence[Finding], num_rows: int, split: str) -> Iterator[Message]:
    """The message on rows that are not used, if there are any."""
    count = sum(each.count for each in dropped)
    if count:
        share, most = count / num_rows, dropped[0]
        yield Message(
            "error" if share > 0.01 else "warning",
            f"Dropped: {count:,} of {num_rows:,} {split} rows ({percent(share)}), most often: "
            f"{most.title}; first: {most.examples[0]}.",
        )


def _of_rows(split: SplitReport) -> Iterator[Message]:
    yield from of_dropped(split.dropped, split.num_rows, split.name)
    if len(split.styles) > 1:
        yield Message(
            "error", f"The {split.name} files mix chat messages with plain text; training does not accept mixed styles."
        )
    lengths = split.lengths
    if lengths.num_beyond and lengths.long_texts != "dropped":
        what = "Truncated to" if lengths.long_texts == "truncated" else "Training stops at texts longer than"
        share = lengths.num_beyond / lengths.num_encoded
        yield Message(
            "error" if lengths.long_texts == "refused" or lengths.num_beyond > 0.01 * split.num_rows else "warning",
            f"{what} data.max_length={lengths.max_length}: "
            f"{_rows_of(split.name, lengths.num_beyond, share, 'row')}{_first(lengths.examples)}.",
        )
    if split.num_prompts > 1 and split.prompt_share > CONSTANT_SHARE:
        yield Message(
            "warning", f"One prompt: {percent(split.prompt_share)} of the {split.name} rows have the same one."
        )


def _of_truncation(split: SplitReport) -> Iterator[Message]:
    chosen, rejected = find(split.suspicious, "chosen_cut"), find(split.suspicious, "rejected_cut")
    if not chosen or not rejected:
        return
    more, less = max(chosen.share, rejected.share), min(chosen.share, rejected.share)
    if max(chosen.count, rejected.count) >= 20 and more > 1.5 * less + 0.01:
        yield Message(
            "warning",
            f"Truncation: {percent(chosen.share)} of the chosen and {percent(rejected.share)} of the rejected "
            f"{split.name} responses end mid-sentence; a model can learn to detect that instead of quality.",
        )


def _of_lengths(split: SplitReport) -> Iterator[Message]:
    share = split.length_bias[0].share
    if share is not None and split.num_pairs >= 100 and abs(share - 0.5) > 0.1:
        which = "longer" if share > 0.5 else "shorter"
        yield Message(
            "warning",
            f"Length bias: the {which} response is chosen in {percent(max(share, 1 - share))} of the pairs; "
            "also report accuracy on pairs of similar length.",
        )
    cost = split.cost
    packed = cost.packed if cost.shared is None else cost.shared
    if packed:
        how = "Length-sorted batches" if cost.pads else "Packing"
        yield Message(
            "ok", f"{how}: {cost.padded_batch / packed:.1f}x fewer {cost.unit} than padded batches of 8 pairs."
        )


def _of_leakage(splits: Sequence[SplitReport], leakage: Sequence[Finding]) -> Iterator[Message]:
    yield from _of_findings(leakage, "validation", "leakage, ")
    styles = {style for split in splits for style in split.styles}
    if len(styles) > 1 and all(len(split.styles) == 1 for split in splits):
        yield Message(
            "error",
            "Training and validation data have different styles (chat messages, plain text), an error in training.",
        )


def _of_baselines(report: BaselineReport) -> Iterator[Message]:
    on_val = [each for each in report.baselines if each.on == "validation"]
    best = max(on_val or report.baselines, key=lambda each: each.accuracy, default=None)
    if best is not None:
        yield Message(
            "warning",
            f"Baseline: {best.title} has accuracy {best.accuracy:.3f} (standard error {best.standard_error:.3f}) on "
            f"{best.on} pairs; a reward model should exceed it.",
        )
