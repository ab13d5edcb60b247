"""Verdicts: what to look at first, as sentences, the most important ones on top."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rm_gallery.inspection.baselines import Baseline
from rm_gallery.inspection.duplicates import CONSTANT_SHARE
from rm_gallery.inspection.findings import Finding, find
from rm_gallery.inspection.lengths import LengthReport
from rm_gallery.inspection.report import Report, SideReport

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
    for key, what, is_fault in (
        ("p_below_half", "Labelled against what most people preferred", True),
        ("negative_margin", "Negative margins", True),
        ("no_words", "A response without a word", True),
        ("same_words", "Both responses with the same letters and digits", False),
    ):
        suspicious = find(side.suspicious, key)
        if suspicious and suspicious.count:
            level = "act" if is_fault and suspicious.share > 0.005 and suspicious.count >= 10 else "know"
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
