"""export_data: judged answers become files to train on.

    from rm_gallery.core.generator import export_data

    summary = export_data(cases, "data", formats=["parquet", "jsonl"], split_ratio={"train": 0.8, "test": 0.2})

On the command line: `python -m rm_gallery.core.generator.export --input cases.jsonl --output-dir data`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rm_gallery.core.generator.case_files import find_files, iter_cases, read_files
from rm_gallery.core.generator.cases import check_case_mapper, read_cases
from rm_gallery.core.generator.columns import Columns
from rm_gallery.core.generator.command import run_command
from rm_gallery.core.generator.options import DEFAULT_SPLIT, ExportOptions
from rm_gallery.core.generator.pairs import Tally, make_units
from rm_gallery.core.generator.results import GraderChoice, RunnerResults
from rm_gallery.core.generator.rows import Row, Unit
from rm_gallery.core.generator.split import split_units
from rm_gallery.core.generator.summary import ExportSummary, Side
from rm_gallery.core.generator.write import plan_files, write_files
from rm_gallery.core.utils.mapping import Mapper
from rm_gallery.errors import Dropped, UserError

log = logging.getLogger("rm_gallery.core.generator.export")  # under -m its own name is __main__

_MOST_REASONS = 5  # in an error

__all__ = ["ExportSummary", "export_data", "main"]


def export_data(
    cases: Iterable[Any] | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    results: Mapping[str, Sequence[Any]] | str | os.PathLike[str] | None = None,
    grader: GraderChoice = None,
    mapper: Mapper | None = None,
    formats: Sequence[str] | str = ("parquet",),
    split_ratio: Mapping[str, float] = DEFAULT_SPLIT,
    seed: int = 0,
    layout: Literal["pairs", "groups"] = "pairs",
    pairs: Literal["all", "best_worst"] = "all",
    min_difference: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    contradictions: Literal["keep", "drop"] = "keep",
    source: str | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Write `<side>.<format>` for every side and format, and tell what was left out and why.

    cases: dictionaries (a list, anything to iterate over, a DataFrame), or the path or paths of parquet, JSON and
    JSON-lines files or folders of them. A case has one of
        response_a, response_b, score_a, score_b
        responses with scores (or ranks, 1 for the best), or responses as [{"response": ..., "score": ...}]
        response with score, or messages with score; all responses of one prompt are compared with each other
    and, where there is one, its prompt (or query, or messages), text or chat messages; `source` names its data set.
    results: what a GradingRunner returned for these cases, or its results file: the scores come from there.
    grader: whose results, when there are several; {"response_a": name, "response_b": name} for two of them.
    mapper: where in a case the fields named above are, as for a GradingRunner: {"prompt": "input.question"}, or a
    function from a case to a dictionary with these fields.
    split_ratio: share of the rows for each side. No prompt is on two sides; without prompts, no response is. White
    space at the ends makes no other prompt. The shares are met as nearly as whole prompts allow.
    seed: decides what goes where, together with the content; the order of the cases has no part in it.
    layout: `pairs` writes prompt, chosen, rejected, margin and source; `groups` all responses to a prompt in one row,
    with their scores.
    pairs: of several responses `all`, or only the best against the worst.
    min_difference: of the scores of a pair (of the places, where there are only ranks); equal scores never make one.
    max_pairs_per_prompt: more are drawn by lot; for a case without a prompt it is the limit of the case.
    contradictions: `drop` leaves out both of two pairs that say the opposite.
    overwrite: replace files of an earlier export.

    What cannot be used is counted in the summary. A side that gets nothing is warned of, and has no file.
    Raises UserError, and writes nothing, for options, files and results that cannot be used, when no case gives a
    pair, and when a file cannot be written. All texts are in memory once, and less than 2 kB for each case.
    """
    options = ExportOptions.create(
        formats=formats,
        split_ratio=split_ratio,
        seed=seed,
        layout=layout,
        pairs=pairs,
        min_difference=min_difference,
        max_pairs_per_prompt=max_pairs_per_prompt,
        contradictions=contradictions,
        source=source,
        overwrite=overwrite,
    )
    judged = _open_results(results, grader)
    check_case_mapper(mapper)
    inputs = find_files(cases)
    folder = _folder(output_dir)
    outputs = plan_files(folder, list(options.split), options.formats, overwrite=options.overwrite)
    _refuse_inputs(outputs, [*(inputs or ()), *([Path(results)] if isinstance(results, str | os.PathLike) else ())])

    dropped, tally = Dropped(), Tally()
    raw = iter_cases(cases) if inputs is None else read_files(inputs)
    found, num_cases = read_cases(raw, dropped, mapper=mapper, results=judged, source=options.source)
    units = make_units(found, options, tally)
    files, sides = _split(units, options, outputs)
    summary = _summary(num_cases, sides, tally, dropped, options)
    if not units:
        why = "; ".join(summary.left_out()[:_MOST_REASONS])
        raise UserError(f"no pair can be made of {num_cases:,} cases: {why}" if num_cases else "there are no cases")
    write_files(folder, files, Columns.of([row for unit in units for row in unit.rows]), overwrite=options.overwrite)
    for name in summary.empty_sides:
        log.warning("the side %r is empty, and has no file: there are too few prompts to split so", name)
    return summary


def _open_results(results: Any, grader: GraderChoice) -> RunnerResults | None:
    if results is not None:
        return RunnerResults(results, grader)
    if grader is not None:
        raise UserError(f"grader is {grader!r}, but there are no results to choose from; give results=... too")
    return None


def _folder(output_dir: Any) -> Path:
    if not isinstance(output_dir, str | os.PathLike) or not os.fspath(output_dir):
        raise UserError(f"output_dir is {output_dir!r}: it must be the path of a folder")
    return Path(output_dir).expanduser()


def _refuse_inputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    for file in outputs:
        if any(file.exists() and path.exists() and file.samefile(path) for path in inputs):
            raise UserError(f"{file}: this file is an input too; name another output_dir")


def _split(
    units: Sequence[Unit], options: ExportOptions, outputs: Sequence[Path]
) -> tuple[dict[Path, list[Row]], dict[str, Side]]:
    """(rows of each file, what each side gets)."""
    shares = list(options.split.values())
    side_of = split_units([len(unit.rows) for unit in units], shares)
    files: dict[Path, list[Row]] = {}
    sides: dict[str, Side] = {}
    for index, name in enumerate(options.split):
        own = [unit for unit, side in zip(units, side_of, strict=True) if side == index]
        rows = [row for unit in own for row in unit.rows]
        paths = outputs[index * len(options.formats) : (index + 1) * len(options.formats)]
        files.update(dict.fromkeys(paths, rows))
        sides[name] = Side(shares[index], len(rows), len(own), tuple(paths) if rows else ())
    return files, sides


def _summary(
    num_cases: int, sides: Mapping[str, Side], tally: Tally, dropped: Dropped, options: ExportOptions
) -> ExportSummary:
    return ExportSummary(
        num_cases=num_cases,
        sides=sides,
        ties=tally.ties,
        too_close=tally.too_close,
        identical=tally.identical,
        duplicates=tally.duplicates,
        contradictions=tally.contradictions,
        contradictions_dropped=options.contradictions == "drop",
        over_limit=tally.over_limit,
        unpaired=tally.unpaired,
        failures=dropped.counts,
        examples=dropped.examples,
        layout=options.layout,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 0, 2 for a mistake that a person can mend, 130 for Ctrl-C."""
    return run_command(export_data, argv)


if __name__ == "__main__":
    sys.exit(main())
