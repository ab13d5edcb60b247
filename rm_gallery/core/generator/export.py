"""export_data: judged answers become files to train on.

    from rm_gallery.core.generator import export_data

    summary = export_data(cases, "data", formats=["parquet", "jsonl"], split_ratio={"train": 0.8, "test": 0.2})

On the command line: `python -m rm_gallery.core.generator.export --input cases.jsonl --output-dir data`.
A split sends units of several sizes to sides, as near to the wanted shares as whole units allow.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NoReturn

from rm_gallery.core.generator.case_files import find_files, iter_cases, read_files
from rm_gallery.core.generator.cases import FIELDS, check_case_mapper, read_cases
from rm_gallery.core.generator.options import DEFAULT_SPLIT, FORMATS, LAYOUTS, ExportOptions
from rm_gallery.core.generator.pairs import Row, Tally, Unit, make_units
from rm_gallery.core.generator.results import PAIR, GraderChoice, RunnerResults
from rm_gallery.core.generator.summary import ExportSummary, Side
from rm_gallery.core.generator.write import Columns, plan_files, write_files
from rm_gallery.core.utils.mapping import Mapper
from rm_gallery.errors import Dropped, UserError
from rm_gallery.log import setup_logging

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


_ENOUGH = 1e-9
_FEW = 4096  # ways to deal out the units that are all tried


def split_units(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The side of each unit, as an index into `shares`.

    sizes: rows of each unit, in an order that stands for chance. shares: of all rows, adding up to 1.
    Large units are dealt out first, each to the side that has the smallest part of its share yet, so that every side
    gets its share of the large and of the small; then single units move, or change places, while that brings the
    sides nearer to their shares.
    """
    targets = [share * sum(sizes) for share in shares]
    if len(shares) ** min(len(sizes), 16) <= _FEW:
        ways = product(range(len(shares)), repeat=len(sizes))
        return list(min(ways, key=lambda way: round(_distance(sizes, list(way), targets), 6)))
    filled = [0] * len(shares)
    sides = [0] * len(sizes)
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        fitting = [side for side, target in enumerate(targets) if filled[side] + sizes[unit] <= target + _ENOUGH]
        if fitting:
            side = min(fitting, key=lambda side: filled[side] / targets[side])
        else:
            side = max(range(len(shares)), key=lambda side: targets[side] - filled[side])
        sides[unit] = side
        filled[side] += sizes[unit]
    _improve(sizes, sides, targets, filled)
    return sides


def _distance(sizes: Sequence[int], sides: Sequence[int], targets: Sequence[float]) -> float:
    """Rows that lie on another side than the shares want, counted on both."""
    left = list(targets)
    for size, side in zip(sizes, sides, strict=True):
        left[side] -= size
    return sum(map(abs, left))


def _improve(sizes: Sequence[int], sides: list[int], targets: Sequence[float], filled: list[int]) -> None:
    """Move units between sides, in place, one for at most one other at a time, for as long as that helps."""
    by_size: list[dict[int, list[int]]] = [{} for _ in targets]
    for unit, side in enumerate(sides):
        by_size[side].setdefault(sizes[unit], []).append(unit)
    while move := _best_move(by_size, targets, filled):
        giver, taker, given, taken = move
        for size, before, after in ((given, giver, taker), (taken, taker, giver)):
            if size:
                unit = by_size[before][size].pop()
                if not by_size[before][size]:
                    del by_size[before][size]
                by_size[after].setdefault(size, []).append(unit)
                sides[unit] = after
                filled[before] -= size
                filled[after] += size


def _best_move(
    by_size: Sequence[dict[int, list[int]]], targets: Sequence[float], filled: Sequence[int]
) -> tuple[int, int, int, int] | None:
    """(giving side, taking side, size given, size taken back or 0) that helps most; None when nothing helps."""
    best, found = _ENOUGH, None
    for giver in range(len(targets)):
        for taker in range(len(targets)):
            excess, lack = filled[giver] - targets[giver], targets[taker] - filled[taker]
            if giver == taker or excess + lack <= _ENOUGH:
                continue
            for given in by_size[giver]:
                for taken in (0, *by_size[taker]):
                    moved = given - taken
                    gain = abs(excess) + abs(lack) - abs(excess - moved) - abs(lack - moved)
                    if gain > best:
                        best, found = gain, (giver, taker, given, taken)
    return found


PROGRAM = "export"
_ABOUT = """\
Make training data for a reward model of answers that were judged.

Each case, one line of a JSON-lines file or one row of a parquet file, holds one of
  response_a, response_b, score_a, score_b
  responses and scores            lists; or ranks (1 is the best) in place of scores
  response and score              all responses to the same prompt are compared with each other
and, where there is one, the prompt (or query, or messages). For answers that a GradingRunner judged, --input is the
file of the samples and --results the file that the runner wrote (its output_path).

Every two responses with different scores make a row with prompt, chosen, rejected, margin (the difference of the
scores) and source. All rows of a prompt go to the same side, train or test.
"""
_EXAMPLES = """\
examples:
  python -m rm_gallery.core.generator.export --input cases.jsonl --output-dir data
  python -m rm_gallery.core.generator.export --input samples.jsonl --results results.jsonl --grader relevance \\
      --map prompt=question response=answer.text --output-dir data --format parquet jsonl --split train=0.9 test=0.1
  rm-gallery train model.partial_pretrain=MODEL data.train_files=data/train.parquet data.val_files=data/test.parquet
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{PROGRAM}: error: {message} (--help says what there is)", file=sys.stderr)
        raise SystemExit(2)


def run_command(export: Callable[..., Any], argv: Sequence[str] | None = None) -> int:
    """Export as the arguments say, print the summary, and return the exit status.

    export: `export_data`.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or a mistake that was told of
        return int(stop.code or 0)
    setup_logging(logging.DEBUG if arguments.debug else logging.INFO)
    try:
        summary = export(
            arguments.input,
            arguments.output_dir,
            results=arguments.results,
            grader=_grader(arguments.grader),
            mapper=_named(arguments.map, "--map", "FIELD=PATH") or None,
            formats=arguments.format,
            split_ratio=_shares(arguments.split),
            seed=arguments.seed,
            layout=arguments.layout,
            pairs=arguments.pairs,
            min_difference=arguments.min_difference,
            max_pairs_per_prompt=arguments.max_pairs_per_prompt,
            contradictions=arguments.contradictions,
            source=arguments.source,
            overwrite=arguments.overwrite,
        )
        print(summary, flush=True)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: the files are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m rm_gallery.core.generator.{PROGRAM}",
        usage="%(prog)s --input PATH ... --output-dir FOLDER [options]",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="cases: .jsonl, .json or .parquet files, or folders"
    )
    files.add_argument("--output-dir", required=True, metavar="FOLDER", help="gets train.parquet, test.parquet, ...")
    files.add_argument(
        "--format", nargs="+", default=["parquet"], metavar="NAME", help=f"{', '.join(FORMATS)} or both (parquet)"
    )
    files.add_argument("--overwrite", action="store_true", help="replace the files of an earlier export")
    cases = parser.add_argument_group("cases")
    cases.add_argument("--results", metavar="FILE", help="results of a GradingRunner for the cases, as it wrote them")
    cases.add_argument(
        "--grader",
        nargs="+",
        metavar="NAME",
        help="whose results, where there are several; response_a=NAME response_b=NAME for one grader each",
    )
    cases.add_argument(
        "--map",
        nargs="+",
        metavar="FIELD=PATH",
        help=f"where in a case a field is, as prompt=input.question; fields: {', '.join(FIELDS)}",
    )
    cases.add_argument("--source", metavar="NAME", help="name of the data set, for cases that do not name theirs")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--split", nargs="+", metavar="SIDE=SHARE", help="share of the rows for each side (train=0.8 test=0.2)"
    )
    rows.add_argument("--seed", type=int, default=0, metavar="N", help="another seed splits otherwise (0)")
    rows.add_argument(
        "--layout", default="pairs", metavar="NAME", help=f"{' or '.join(LAYOUTS)}: all responses to a prompt in a row"
    )
    rows.add_argument(
        "--pairs", default="all", metavar="NAME", help="all (default), or best_worst: only the best against the worst"
    )
    rows.add_argument(
        "--min-difference", type=float, default=0.0, metavar="X", help="least difference of the scores of a pair (0)"
    )
    rows.add_argument("--max-pairs-per-prompt", type=int, metavar="N", help="draw N where a prompt has more")
    rows.add_argument(
        "--contradictions",
        default="keep",
        metavar="NAME",
        help="keep (default), or drop: leave out both pairs that say the opposite of each other",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    return parser


def _named(items: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for item in items or ():
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise UserError(f"{option} {item}: write it as {form}")
        if name in named:
            raise UserError(f"{option} names {name} twice; name it once")
        named[name] = value
    return named


def _shares(items: Sequence[str] | None) -> dict[str, float]:
    from rm_gallery.core.generator.options import DEFAULT_SPLIT

    if items is None:
        return dict(DEFAULT_SPLIT)
    shares = {}
    for name, value in _named(items, "--split", "SIDE=SHARE, as train=0.8").items():
        try:
            shares[name] = float(value)
        except ValueError:
            raise UserError(f"--split {name}={value}: the share must be a number, as 0.8") from None
    return shares


def _grader(items: Sequence[str] | None) -> str | dict[str, str] | None:
    if items is None:
        return None
    if any(item.startswith(tuple(f"{field}=" for field in PAIR)) for item in items):
        return _named(items, "--grader", "response_a=NAME response_b=NAME")
    if len(items) > 1:
        raise UserError("--grader takes one name, or response_a=NAME response_b=NAME")
    return items[0]


if __name__ == "__main__":
    sys.exit(main())
