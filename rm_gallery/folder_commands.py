"""Commands on the folder of a checkpoint: `push`, `merge` and `export-legacy`."""

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
