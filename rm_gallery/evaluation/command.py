"""`rm-gallery evaluate`: the command line of `evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rm_gallery.scoring.command import add_ensemble_options, add_weights


def add_evaluate(commands: Any, add_loading_options: Callable[[argparse.ArgumentParser], None]) -> None:
    command = commands.add_parser(
        "evaluate",
        help="accuracy, calibration, biases and benchmark scores of reward models",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Evaluate reward models on sets of preferences, and compare them. A SET is\n"
            "  a file, folder, glob, URL or hub dataset in any format that train reads,\n"
            "  a benchmark: rewardbench, prior-sets, rewardbench-2, rm-bench, judgebench,\n"
            "    rmb, ppe-correctness, helpsteer3, llmbar (of the hub), or\n"
            "  NAME=PATH: a local copy of a benchmark, or a set under another name.\n"
            "A MODEL is a checkpoint, a run, an adapter, a classifier with one label, an\n"
            "ensemble A+B, [PROTOCOL:]URL[,URL...][#NAME], a reward server, or\n"
            "grader:NAME:MODEL, a chat model behind an API.\n"
            "  rm-gallery evaluate --model runs/a --model runs/b test.parquet rewardbench-2\n"
            "Set columns with data.KEY=VALUE, e.g. data.chosen_key=better. What the figures\n"
            "mean: docs/evaluate.md."
        ),
    )
    command.add_argument("sets", nargs="+", metavar="SET", help="data or benchmark; or data.KEY=VALUE")
    command.add_argument(
        "--model", action="append", required=True, metavar="MODEL", help="repeat to compare others with the first"
    )
    command.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    command.add_argument("--html", metavar="FILE", help="write one self-contained page with charts and texts")
    command.add_argument(
        "--markdown",
        metavar="FILE",
        help="write the report as Markdown; into the README.md of a checkpoint as a section",
    )
    command.add_argument(
        "--rewardbench", metavar="FILE", help="write FILE and FILE_outputs.jsonl as the package rewardbench does"
    )
    command.add_argument("--max-pairs", type=int, metavar="N", help="evaluate a random sample of N rows of each set")
    command.add_argument(
        "--probes",
        action=argparse.BooleanOptionalAction,
        help="score changed texts of a sample (default: on; off for graders)",
    )
    command.add_argument("--probe-pairs", type=int, metavar="N", help="pairs in that sample (200)")
    command.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="length and bag of words (on)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and bootstraps (0)")
    add_ensemble_options(command, "normalize the rewards of an ensemble's models by their validation rewards")
    add_weights(command)
    add_loading_options(command)
    command.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="folder or hub name of a server's model: texts are tokenized as in training",
    )
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")
    command.set_defaults(run=_evaluate, words="sets", when_stopped="nothing was written")


def _evaluate(arguments: argparse.Namespace) -> None:
    from rm_gallery.evaluation import rewardbench_files
    from rm_gallery.evaluation.probes import DEFAULT_PAIRS
    from rm_gallery.evaluation.report import as_text
    from rm_gallery.evaluation.report_files import check_target, text_of, write_report
    from rm_gallery.evaluation.run import EvaluateOptions, run
    from rm_gallery.evaluation.scorers import ScorerOptions, with_ensemble
    from rm_gallery.evaluation.sets import is_setting, load_data_config, open_sets
    from rm_gallery.safe_text import safe

    targets: dict[str, Path] = {}
    for name in ("json", "html", "markdown", "rewardbench"):
        if getattr(arguments, name) is not None:
            targets[name] = check_target(getattr(arguments, name), f"--{name}", name)
    probe_pairs = arguments.probe_pairs
    if arguments.probes is not None:
        probe_pairs = (probe_pairs or DEFAULT_PAIRS) if arguments.probes else 0
    options = EvaluateOptions(arguments.max_pairs, probe_pairs, arguments.baselines, arguments.seed)
    options.check()
    settings = [text for text in arguments.sets if is_setting(text)]
    named = [text for text in arguments.sets if text not in settings]
    sets = open_sets(named, load_data_config(settings), max_items=options.max_pairs, seed=options.seed)
    loading = ScorerOptions(
        device=arguments.device,
        dtype=arguments.dtype,
        token_budget=arguments.token_budget,
        trust_remote_code=arguments.trust_remote_code,
        base=arguments.base,
        quantized=not arguments.unquantized,
        template_date=arguments.template_date,
        tokenizer=arguments.tokenizer,
        ensemble=arguments.ensemble or "mean",
        normalize=arguments.normalize,
        weights=arguments.weights,
    )
    models = arguments.model if arguments.ensemble is None else with_ensemble(arguments.model)
    with contextlib.ExitStack() as stack:
        sink = None
        if "rewardbench" in targets:
            rewardbench_files.check_single(len(models), len(sets))
            sink = stack.enter_context(rewardbench_files.rewardbench_rows(targets["rewardbench"])).add
        result = run(models, sets, options, loading, sink=sink)
    command = shlex.join(["rm-gallery", *sys.argv[1:]])
    kinds = [name for name in targets if name != "rewardbench"]
    texts = {name: text_of(result, name, targets[name], command=command) for name in kinds}
    for name, text in texts.items():
        write_report(targets[name], text, f"--{name}")
    if "rewardbench" in targets:
        rewardbench_files.write_summary(targets["rewardbench"], result["models"][0])
    print(safe(as_text(result)))  # last: a reader such as `head` may end before the text does
    for name, target in targets.items():
        print(safe(f"{name}: {target}"))
