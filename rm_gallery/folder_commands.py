"""Commands on folders of checkpoints (`push`, `merge`, `average`, `export-legacy`) and of runs (`report`, `watch`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rm_gallery.safe_text import safe


def add_push(commands: Any) -> None:
    command = commands.add_parser(
        "push",
        help="upload a checkpoint to the Hugging Face hub",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Upload a checkpoint to the Hugging Face hub, with its model card and without\n"
            "its training state. The repository is created if it does not exist.\n"
            "  rm-gallery push checkpoints/bt/my-rm/global_step_500 my-org/my-rm --private\n"
            "The token is that of `hf auth login`, or $HF_TOKEN."
        ),
    )
    command.add_argument("folder", metavar="FOLDER", help="checkpoint, or any folder with a model")
    command.add_argument("name", metavar="ORG/NAME", help="repository of the hub")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")
    command.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    command.add_argument("--message", metavar="TEXT", help="commit message")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_push, words="", when_stopped="rerun the command to upload the rest")


def _push(arguments: argparse.Namespace) -> None:
    from rm_gallery.push import push

    address = push(
        arguments.folder,
        arguments.name,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
    )
    print(safe(address))


def add_merge(commands: Any) -> None:
    command = commands.add_parser(
        "merge",
        help="merge an adapter (LoRA) into its base model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Merge an adapter (LoRA) into its base model and write a folder that every\n"
            "program reads that reads other checkpoints. Rewards of a few texts are compared\n"
            "with those of the adapter.\n"
            "  rm-gallery merge checkpoints/bt/my-rm/global_step_500 --output my-rm"
        ),
    )
    command.add_argument("folder", metavar="FOLDER", help="checkpoint or run with an adapter")
    command.add_argument("--output", metavar="FOLDER", help="folder to write (default: FOLDER-merged)")
    command.add_argument("--base", metavar="FOLDER", help="base model, if the adapter names another path")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the written weights (fp32)")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_merge, words="", when_stopped="nothing was written")


def _merge(arguments: argparse.Namespace) -> None:
    from rm_gallery.scoring.merge import merge

    target = merge(arguments.folder, arguments.output, base=arguments.base, dtype=arguments.dtype)
    print(safe(f"merged: {target}"))


def add_average(commands: Any) -> None:
    command = commands.add_parser(
        "average",
        help="average the weights of reward models, or of language models",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write a model whose weights are the mean of those of several checkpoints: of one\n"
            "run, or of runs from the same base model with other seeds or settings.\n"
            "  rm-gallery average checkpoints/bt/seed1 checkpoints/bt/seed2 --output averaged\n"
            "Adapters (LoRA) are merged into their base model first."
        ),
    )
    command.add_argument("folders", nargs="+", metavar="FOLDER", help="checkpoint or run")
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    command.add_argument(
        "--weights", type=_numbers, metavar="W,W,...", help="weight of each model, in their order (default: equal)"
    )
    command.add_argument("--base", metavar="FOLDER", help="base model, if adapters name another path")
    command.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the written weights (as the models')"
    )
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_average, words="folders", when_stopped="nothing was written")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _average(arguments: argparse.Namespace) -> None:
    from rm_gallery.scoring.average import average

    target = average(
        arguments.folders, arguments.output, weights=arguments.weights, base=arguments.base, dtype=arguments.dtype
    )
    print(safe(f"averaged: {target}"))


def add_export_legacy(commands: Any) -> None:
    command = commands.add_parser(
        "export-legacy",
        help="repair a checkpoint of an earlier version for transformers 4.x",
        description=(
            "Add the configuration keys of transformers 4.x to a checkpoint that RM-Gallery wrote before it added them "
            "itself. Weights and rewards stay as they are, and runs still resume from it."
        ),
    )
    command.add_argument("folder", metavar="FOLDER", help="checkpoint")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_export_legacy, words="", when_stopped="rerun the command")


def _export_legacy(arguments: argparse.Namespace) -> None:
    from rm_gallery.modeling.legacy_keys import repair_folder

    folder = Path(arguments.folder).expanduser()
    changed = repair_folder(folder)
    print(safe(f"{folder}: " + (f"changed {', '.join(changed)}" if changed else "nothing to change")))


def add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write a report of runs, side by side, as an HTML page",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write a report of one run or several as a self-contained HTML page: curves,\n"
            "last metrics, warnings, and for several runs the settings that differ.\n"
            "  rm-gallery report checkpoints/bt/a checkpoints/bt/b --output compared.html"
        ),
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    command.add_argument(
        "--output", metavar="FILE", help="page to write (default: report.html of a single run, else compared.html)"
    )
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_report, words="runs", when_stopped="nothing was written")


def _report(arguments: argparse.Namespace) -> None:
    from rm_gallery.errors import UserError
    from rm_gallery.files import write_text
    from rm_gallery.html_page import is_foreign
    from rm_gallery.training.report.history import read_run
    from rm_gallery.training.report.page import MARKER, page_of

    folders = [Path(each).expanduser() for each in arguments.runs]
    runs = [read_run(folder) for folder in folders]
    default = folders[0] / "report.html" if len(folders) == 1 else Path("compared.html")
    target = default if arguments.output is None else Path(arguments.output).expanduser()
    if is_foreign(target, MARKER):
        raise UserError(f"{target}: exists and is no report of a run; give another --output")
    try:
        write_text(target, page_of(runs))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); give another --output") from error
    print(safe(str(target)))


def add_watch(commands: Any) -> None:
    command = commands.add_parser(
        "watch",
        help="serve the report of a run live on 127.0.0.1",
        description="Serve the report of a run as a live page on this machine (127.0.0.1), until Ctrl-C.",
    )
    command.add_argument("folder", metavar="RUN", help="run directory")
    command.add_argument("--port", type=int, default=8484, metavar="N", help="port (default: 8484; 0: a free one)")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_watch, words="", when_stopped="the page is no longer served")


def _watch(arguments: argparse.Namespace) -> None:
    from rm_gallery.training.report.live import HOST, serve

    with serve(Path(arguments.folder).expanduser(), arguments.port) as server:
        print(safe(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C to stop)"), flush=True)
        server.serve_forever()
