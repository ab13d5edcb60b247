"""The report: every figure about the data as plain records, from which terminal, HTML and JSON are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rm_gallery.data.batching.plan import PackingConfig
from rm_gallery.inspection.baselines import BaselineReport, baseline_report
from rm_gallery.inspection.duplicates import duplicate_findings, overlap_findings
from rm_gallery.inspection.encoders import Encoder
from rm_gallery.inspection.findings import Finding, dropped_findings
from rm_gallery.inspection.lengths import CostReport, LengthReport, LongTexts, cost_report, length_report
from rm_gallery.inspection.longer import LongerReport, SourceReport, longer_report, source_reports
from rm_gallery.inspection.samples import Sample, make_sample
from rm_gallery.inspection.survey import Survey
from rm_gallery.inspection.suspicious import suspicious_findings


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
