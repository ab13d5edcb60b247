"""The command line: `rm-gallery train | validate-config | show-data | estimate | score`.

Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rm_gallery import __version__
from rm_gallery.errors import StoppedBySignal, UserError
from rm_gallery.log import setup_logging, speak_in_turn

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, default_config: str | None = None) -> int:
    """Run one command; returns its exit status: 0, 2 for a mistake that a person can mend, 130 for Ctrl-C, 143
    for SIGTERM after the run was saved.

    default_config: YAML file that `--config` starts from; recipes give their own.
    """
    arguments = _parse(_parser(default_config), argv)
    # Threads that wait for each other must sleep, not spin: on cores that others use too, spinning made small models
    # three to seven times slower. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    setup_logging(logging.DEBUG if arguments.debug else logging.INFO)
    try:
        arguments.run(arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        rank = speak_in_turn()
        for line in str(error).splitlines():
            print(f"{rank}rm-gallery: error: {line}", file=sys.stderr)
        return 2
    except StoppedBySignal as stopped:
        print(f"rm-gallery: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"rm-gallery: stopped by Ctrl-C; {arguments.when_stopped}", file=sys.stderr)
        return 130
    return 0


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command; argparse alone takes no more words once an option stood between them."""
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    setattr(arguments, arguments.words, [*getattr(arguments, arguments.words), *rest])
    return arguments


def _parser(default_config: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rm-gallery", description="Train Bradley-Terry reward models and use them.")
    parser.add_argument("--version", action="version", version=f"rm-gallery {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", _train, "train a reward model"),
        ("validate-config", _validate_config, "check a configuration, its files included, without training"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        _add_config(command, default_config)
        command.set_defaults(run=run, words="overrides", when_stopped="checkpoints that were written are whole")
    _add_show_data(commands, default_config)
    _add_estimate(commands, default_config)
    _add_score(commands)
    return parser


def _add_config(command: argparse.ArgumentParser, default_config: str | None) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration values, as optim.lr=1e-6")
    command.add_argument("--config", default=default_config, metavar="FILE", help="YAML file to start from")
    command.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")


def _add_show_data(commands: Any, default_config: str | None) -> None:
    command = commands.add_parser(
        "show-data",
        help="show what the model will see: lengths, duplicates, leaks, baselines, samples",
        description=(
            "Read the data of a configuration as training would and show what is in it. Takes the same words as train; "
            "data.train_files is enough, and with model.partial_pretrain lengths are in that model's tokens."
        ),
    )
    _add_config(command, default_config)
    command.add_argument("--html", metavar="FILE", help="write the report as one HTML file as well")
    command.add_argument("--json", action="store_true", help="print every figure as JSON instead")
    command.add_argument("--samples", type=int, default=3, metavar="N", help="rows shown as text (default: 3)")
    command.set_defaults(run=_show_data, words="overrides", when_stopped="nothing was written")


def _add_estimate(commands: Any, default_config: str | None) -> None:
    command = commands.add_parser(
        "estimate",
        help="memory, micro-batch and time of a run, before it has its machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Memory of each GPU by kind, the micro-batch that fits, the time of an epoch, and what to change when it\n"
            "does not fit. Reads a model's config.json and a sample of the data; no weights.\n"
            "  rm-gallery estimate model=qwen2.5-7b n_gpus=8 gpu=h200 data=train.parquet\n"
            "Keys besides those of training: n_gpus, gpu (h200, h100, a100-80, a100-40, l40s, 4090, cpu),\n"
            "gpus_per_node, gpu_memory_gib, mfu, pairs, prompt_tokens, response_tokens, tokenizer, chars_per_token."
        ),
    )
    _add_config(command, default_config)
    command.add_argument("--json", action="store_true", help="print values in bytes and seconds instead of text")
    command.set_defaults(run=_estimate, words="overrides", when_stopped="nothing was written")


def _add_score(commands: Any) -> None:
    command = commands.add_parser(
        "score",
        help="score files with trained models",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Score files with trained models. Columns that are read, the first that a file has:\n"
            "  chosen and rejected  gives reward_chosen and reward_rejected\n"
            "  messages             gives reward, of the last turn\n"
            "  responses (a list)   gives rewards (a list)\n"
            "  response             gives reward\n"
            "and prompt with them, if it is there. With several models, NAME/ goes before these columns.\n"
            "The same command goes on where it stopped."
        ),
    )
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="parquet or JSON-lines file, or folder of them")
    command.add_argument("--model", action="append", required=True, metavar="FOLDER", help="give it again for more")
    command.add_argument("--output", required=True, metavar="PATH", help="a folder; for one input a file, too")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    command.add_argument("--dtype", default="auto", help="auto (default: bf16 on a GPU), fp32, bf16")
    command.add_argument("--token-budget", type=int, metavar="N", help="most tokens of one model call")
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that a model brings along")
    command.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    command.set_defaults(run=_score, words="inputs", when_stopped="the same command goes on from here")


@contextmanager
def _loading() -> Iterator[None]:
    """Import without rounds of the garbage collector, which find nothing and take a sixth of the time to start.

    What was loaded is left out of later rounds, too.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield  # in a process of its owner's, who may have garbage
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
        from rm_gallery.training.setup import run_training
    result = run_training(load_config(arguments.config, arguments.overrides))
    if result.is_main:
        print(f"checkpoint: {result.checkpoint}")


def _validate_config(arguments: argparse.Namespace) -> None:
    with _loading():
        from rm_gallery.training.config import load_config
        from rm_gallery.training.data_setup import check_inputs
    config = load_config(arguments.config, arguments.overrides)
    check_inputs(config)
    print(f"configuration is valid; the run folder will be {config.trainer.run_dir}")


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
    print(json.dumps(as_values(found, advice), indent=2) if arguments.json else as_text(found, advice))


def _score(arguments: argparse.Namespace) -> None:
    from rm_gallery.scoring.score_files import ScoreOptions, score_files

    options = ScoreOptions(
        models=tuple(arguments.model),
        inputs=tuple(arguments.inputs),
        output=arguments.output,
        device=arguments.device,
        dtype=arguments.dtype,
        token_budget=arguments.token_budget,
        trust_remote_code=arguments.trust_remote_code,
    )
    for scored in score_files(options):
        print(f"{scored.output}: {scored.num_rows} rows" + (", there already" if scored.was_there else ""))
        for model, unscored in scored.unscored.items():
            if unscored.total:
                print(f"  {model}: {unscored.total} without a reward: {unscored.describe()}")


if __name__ == "__main__":
    sys.exit(main())
