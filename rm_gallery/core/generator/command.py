"""The command line of an export: its arguments, and what is printed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rm_gallery.core.generator.cases import FIELDS
from rm_gallery.core.generator.options import FORMATS, LAYOUTS
from rm_gallery.core.generator.results import PAIR
from rm_gallery.errors import UserError
from rm_gallery.log import setup_logging

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
