"""The command line: `rm-gallery train | score | rank | evaluate | serve | ...`.

Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rm_gallery import __version__
from rm_gallery.errors import StoppedBySignal, UserError
from rm_gallery.evaluation.command import add_evaluate
from rm_gallery.folder_commands import add_average, add_export_legacy, add_merge, add_push, add_report, add_watch
from rm_gallery.log import safe_traceback, setup_excepthook, setup_logging, wait_for_local_main
from rm_gallery.safe_text import safe, visible
from rm_gallery.scoring.command import add_rank, add_score
from rm_gallery.serving.command import add_serve
from rm_gallery.training.find_lr import add_find_lr

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, default_config: str | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM after the
    run was saved.

    default_config: default of `--config`; recipes pass their own file.
    """
    arguments = _parse(_parser(default_config), argv)
    # OpenMP threads must sleep while they wait, not spin: on shared cores, spinning made small models three to seven
    # times slower. torch reads it when it is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    setup_logging(logging.DEBUG if arguments.debug else logging.INFO)
    setup_excepthook()
    try:
        arguments.run(arguments)
    except UserError as error:
        if arguments.debug:
            print(safe_traceback(error), end="", file=sys.stderr)
        rank = wait_for_local_main()
        for line in visible(str(error)).split("\n"):
            print(f"{rank}rm-gallery: error: {line}", file=sys.stderr)
        return 2
    except StoppedBySignal as stopped:
        print(safe(f"rm-gallery: {stopped}"), file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter reports it at exit
        return 141
    except KeyboardInterrupt:
        print(f"rm-gallery: stopped by Ctrl-C; {arguments.when_stopped}", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Escapes control characters in its messages, which repeat arguments."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(safe(message), file)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command. argparse does not accept positionals after an option, so they are appended here."""
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and not arguments.words):
        if arguments.words == "overrides":
            from rm_gallery.training.familiar_names import answer_options

            answers = answer_options(sys.argv[1:] if argv is None else argv)
            if answers:
                parser.exit(2, "".join(f"rm-gallery: error: {answer}\n" for answer in answers))
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(arguments, arguments.words, [*getattr(arguments, arguments.words), *rest])
    return arguments


_MAIN_KEYS = """
  rm-gallery train model.partial_pretrain=Qwen2.5-0.5B-Instruct \\
      data.train_files=train.parquet data.val_fraction=0.05 optim.lr=5e-6

The keys that most runs set, with their defaults:
  model.partial_pretrain         folder or hub name of the model to start from
  data.train_files               file, folder, glob, URL or hub dataset, or a list
  data.val_files                 the same for validation
  data.val_fraction       0      or: share of the prompts to hold out
  data.max_length         4096   longer texts are dropped, in tokens
  data.train_batch_size   256    pairs per step, over all GPUs
  optim.lr                1e-6   peak learning rate
  optim.lr_scheduler      cosine cosine, wsd or constant
  trainer.total_epochs    1
  trainer.test_freq       -1     steps between validations (-1: at the end)
  trainer.save_freq       -1     steps between checkpoints (-1: at the end)
  trainer.experiment_name        run directory in ./checkpoints/bt (default: time)
All keys: docs/configuration.md. From Python: docs/python.md."""


def _parser(default_config: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="rm-gallery", description="Train Bradley-Terry reward models and use them.")
    parser.add_argument("--version", action="version", version=f"rm-gallery {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text, more in (
        ("train", _train, "train a reward model", _MAIN_KEYS),
        ("validate-config", _validate_config, "check a configuration and its files without training", ""),
    ):
        command = commands.add_parser(
            name,
            help=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{text[0].upper()}{text[1:]}.{more}",
        )
        _add_config(command, default_config)
        command.set_defaults(run=run, words="overrides", when_stopped="rerun the command to resume")
    _add_show_data(commands, default_config)
    _add_estimate(commands, default_config)
    add_find_lr(commands, lambda command: _add_config(command, default_config))
    add_score(commands, _add_loading_options)
    add_rank(commands, _add_loading_options)
    add_evaluate(commands, _add_loading_options)
    add_serve(commands, _add_loading_options)
    _add_export_data(commands)
    add_report(commands)
    add_watch(commands)
    add_push(commands)
    add_merge(commands)
    add_average(commands)
    add_export_legacy(commands)
    return parser


def _add_config(command: argparse.ArgumentParser, default_config: str | None) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration override, e.g. optim.lr=1e-6")
    command.add_argument("--config", default=default_config, metavar="FILE", help="YAML configuration file")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")


def _add_show_data(commands: Any, default_config: str | None) -> None:
    command = commands.add_parser(
        "show-data",
        help="report on the data: lengths, length bias, duplicates, leakage, baselines, samples",
        description=(
            "Read the data as training does and report on it. Takes the configuration of train; data.train_files is "
            "enough. Lengths are in words, or in tokens with model.partial_pretrain."
        ),
    )
    _add_config(command, default_config)
    command.add_argument(
        "--html", metavar="FILE", help="write the report as a self-contained HTML file; print the summary only"
    )
    command.add_argument("--json", action="store_true", help="print every figure as JSON instead")
    command.add_argument("--samples", type=int, default=3, metavar="N", help="number of rows to show (default: 3)")
    command.set_defaults(run=_show_data, words="overrides", when_stopped="nothing was written")


def _add_estimate(commands: Any, default_config: str | None) -> None:
    command = commands.add_parser(
        "estimate",
        help="estimate peak memory, the largest micro-batch and the time of an epoch, without a GPU",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Estimate the peak memory of each GPU, the largest micro-batch that fits, the\n"
            "time of an epoch, and the changes that make the run fit. Reads the model's\n"
            "config.json and a sample of the data, no weights.\n"
            "  rm-gallery estimate model=qwen2.5-7b n_gpus=8 gpu=h200 data=train.parquet\n"
            "Keys in addition to those of train: n_gpus, gpu (b200, h200, h100, a100-80,\n"
            "a100-40, mi300x, l40s, a6000, 4090, 3090, l4, a10g, t4, cpu), gpus_per_node,\n"
            "gpu_memory_gib, mfu, pairs, prompt_tokens, response_tokens, tokenizer,\n"
            "chars_per_token."
        ),
    )
    _add_config(command, default_config)
    command.add_argument("--json", action="store_true", help="print all values as JSON, in bytes, FLOPs and seconds")
    command.set_defaults(run=_estimate, words="overrides", when_stopped="nothing was written")


def _add_loading_options(command: argparse.ArgumentParser) -> None:
    """How reward models are loaded."""
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    command.add_argument("--dtype", default="auto", help="auto (default: bf16 on a GPU), fp32, bf16")
    command.add_argument("--token-budget", type=int, metavar="N", help="maximum tokens per model call")
    command.add_argument("--trust-remote-code", action="store_true", help="run code from the model folder")
    command.add_argument("--base", metavar="FOLDER", help="base model of an adapter, if its folder names another path")
    command.add_argument(
        "--unquantized", action="store_true", help="do not quantize the base model of an adapter that was trained so"
    )
    command.add_argument(
        "--template-date", metavar="DATE", help="date (YYYY-MM-DD) for a chat template that writes today's"
    )


def _add_export_data(commands: Any) -> None:
    command = commands.add_parser(
        "export-data",
        help="export scored responses as training data",
        usage="%(prog)s (--input PATH ... | --dataset NAME) --output-dir FOLDER [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description=(
            "Export scored responses as training data. A case is one row of the input, with\n"
            "  response_a, response_b, score_a, score_b\n"
            "  responses and scores   lists; or ranks (1 is best) instead of scores\n"
            "  response and score     responses to the same prompt are compared\n"
            "and optionally prompt (or query, or messages). With --results the scores come\n"
            "from a GradingRunner: --input is the file of its samples, --results its\n"
            "output_path.\n\n"
            "Every two responses with different scores give a row with prompt, chosen,\n"
            "rejected, margin (the difference of the scores) and source. All rows of a\n"
            "prompt are in the same split."
        ),
        epilog=(
            "examples:\n"
            "  rm-gallery export-data --input cases.jsonl --output-dir data\n"
            "  rm-gallery export-data --dataset helpsteer2 --output-dir data\n"
            "  rm-gallery export-data --input samples.jsonl --results results.jsonl \\\n"
            "      --grader relevance --map prompt=question response=answer.text \\\n"
            "      --output-dir data --split train=0.9 test=0.1"
        ),
    )
    add = command.add_argument
    cases = command.add_mutually_exclusive_group(required=True)
    cases.add_argument("--input", nargs="+", metavar="PATH", help="file, folder, glob, URL or hub dataset of cases")
    cases.add_argument("--dataset", metavar="NAME", help="hub dataset of cases: helpsteer2, or org/name")
    add("--output-dir", required=True, metavar="FOLDER", help="folder for train.parquet, test.parquet, ...")
    add("--format", nargs="+", default=["parquet"], metavar="NAME", help="parquet (default), jsonl or both")
    add("--overwrite", action="store_true", help="replace the files of an earlier export")
    add("--results", metavar="FILE", help="results file of a GradingRunner for the cases")
    add(
        "--grader",
        nargs="+",
        metavar="NAME",
        help="grader whose results to use; response_a=NAME response_b=NAME for one per response",
    )
    add("--map", nargs="+", metavar="FIELD=PATH", help="path of a field in a case, e.g. prompt=input.question")
    add("--source", metavar="NAME", help="name of the data set, for cases without one")
    add("--split", nargs="+", metavar="SIDE=SHARE", help="share of the rows for each side (train=0.8 test=0.2)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the split (0)")
    add("--layout", default="pairs", metavar="NAME", help="pairs (default), or groups: all responses in one row")
    add("--pairs", default="all", metavar="NAME", help="all (default), or best_worst: the best against the worst")
    add("--min-difference", type=float, default=0.0, metavar="X", help="minimum difference of the scores (0)")
    add("--max-pairs-per-prompt", type=int, metavar="N", help="keep a random sample of N pairs of a prompt")
    add(
        "--contradictions",
        default="keep",
        metavar="NAME",
        help="keep (default) pairs with opposite labels, or drop both",
    )
    add("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_export_data, words="", when_stopped="nothing was written")


@contextmanager
def _loading() -> Iterator[None]:
    """Import with garbage collection disabled: it finds nothing, and takes a sixth of the start-up time.

    Loaded objects are frozen, so that later collections skip them too.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield  # called from a program that already has objects to collect
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _train(arguments: argparse.Namespace) -> None:
    with _loading():
        from rm_gallery.training.config import load_config
        from rm_gallery.training.run_dir import CURVES_NAME
        from rm_gallery.training.setup import run_training
    result = run_training(load_config(arguments.config, arguments.overrides))
    if result.is_main:
        print(visible(f"checkpoint: {result.checkpoint}"))
        if (result.run_dir / CURVES_NAME).is_file():
            print(visible(f"curves: {result.run_dir / CURVES_NAME}"))


def _validate_config(arguments: argparse.Namespace) -> None:
    with _loading():
        from rm_gallery.training.config import load_config
        from rm_gallery.training.data_setup import check_inputs
    config = load_config(arguments.config, arguments.overrides)
    check_inputs(config)
    print(visible(f"configuration is valid; run directory: {config.trainer.run_dir}"))


def _show_data(arguments: argparse.Namespace) -> None:
    from rm_gallery.inspection.command import show_data

    show_data(
        arguments.config, arguments.overrides, html=arguments.html, as_json=arguments.json, samples=arguments.samples
    )


def _estimate(arguments: argparse.Namespace) -> None:
    from rm_gallery.planning.config import load_estimate_config

    config = load_estimate_config(arguments.config, arguments.overrides)
    from rm_gallery.planning.estimate import estimate
    from rm_gallery.planning.report import advise, as_text, as_values

    found = estimate(config)
    advice = None if found.fits else advise(found)
    print(json.dumps(as_values(found, advice), indent=2) if arguments.json else safe(as_text(found, advice)))


def _export_data(arguments: argparse.Namespace) -> None:
    from rm_gallery.core.generator.write import export_data, known_dataset

    cases, mapper = arguments.input, _named(arguments.map or [], "--map", "FIELD=PATH")
    if arguments.dataset is not None:
        cases, own = known_dataset(arguments.dataset)
        mapper = {**own, **mapper}
        fields = "".join(f", {name}={path}" for name, path in mapper.items())
        log.info("--dataset %s: reading %s%s", arguments.dataset, cases, fields)
    grader: Any = arguments.grader
    if grader is not None and any(item.startswith(("response_a=", "response_b=")) for item in grader):
        grader = _named(grader, "--grader", "response_a=NAME response_b=NAME")
    elif grader is not None and len(grader) > 1:
        raise UserError("--grader takes one name, or response_a=NAME response_b=NAME")
    elif grader is not None:
        [grader] = grader
    options: dict[str, Any] = {}
    if arguments.split is not None:
        split = _named(arguments.split, "--split", "SIDE=SHARE, e.g. train=0.8")
        options["split_ratio"] = {side: _share(side, share) for side, share in split.items()}
    for name in ("seed", "layout", "pairs", "min_difference", "max_pairs_per_prompt", "contradictions", "source"):
        options[name] = getattr(arguments, name)
    summary = export_data(
        cases, arguments.output_dir, results=arguments.results, grader=grader, mapper=mapper or None,
        formats=arguments.format, overwrite=arguments.overwrite, **options,
    )  # fmt: skip
    print(safe(str(summary)), flush=True)


def _named(items: Sequence[str], option: str, form: str) -> dict[str, str]:
    """`NAME=VALUE` items of an option. Raises UserError for another form and for a repeated name."""
    named: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise UserError(f"{option} {item}: expected {form}")
        if name in named:
            raise UserError(f"{option} has {name} twice; give it once")
        named[name] = value
    return named


def _share(side: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--split {side}={text}: the share must be a number, e.g. 0.8") from None


if __name__ == "__main__":
    sys.exit(main())
