"""Places: examples with the names of their files instead of whole paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from rm_gallery.inspection.findings import Finding
from rm_gallery.inspection.report import Report, SideReport


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
