"""`rm-gallery score` and `rm-gallery rank`: their command lines."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.scoring.jobs import ScoreOptions


def add_ensemble_options(command: argparse.ArgumentParser, normalize: str) -> None:
    """normalize: what `--normalize` does."""
    command.add_argument(
        "--ensemble",
        metavar="HOW",
        help="the models' rewards as one: mean, lower (mean - std; lower:K for mean - K std) or min",
    )
    command.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"{normalize} (default: rewards of an ensemble, where all models have these figures)",
    )


def add_score(commands: Any, add_loading_options: Callable[[argparse.ArgumentParser], None]) -> None:
    command = commands.add_parser(
        "score",
        help="score files with trained models",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Score files with trained models. Reads all files and formats that train reads,\n"
            "and responses without labels. Added columns, by the first match of a file:\n"
            "  chosen and rejected   reward_chosen and reward_rejected\n"
            "  messages              reward, of the last turn\n"
            "  responses (a list)    rewards (a list); also for other formats with a list\n"
            "  response              reward\n"
            "Optional columns: prompt, tools. Set column names with data.KEY=VALUE, e.g.\n"
            "  rm-gallery score --model MODEL --output out data.chosen_key=better a.csv.gz\n"
            "data.split, data.subset and data.revision select from a hub dataset. The output\n"
            "has the input's columns and the rewards: JSON lines for JSON, parquet for other\n"
            "inputs, or the format of the suffix of --output. With several models, reward\n"
            "columns are prefixed with NAME/. Rerun a stopped command to resume."
        ),
    )
    _add_models_and_files(command)
    command.add_argument(
        "--best", action="store_true", help="for lists: add best_index and best_response, of the highest reward"
    )
    add_loading_options(command)
    command.set_defaults(run=_score, words="inputs", when_stopped="rerun the command to resume")


def add_rank(commands: Any, add_loading_options: Callable[[argparse.ArgumentParser], None]) -> None:
    command = commands.add_parser(
        "rank",
        help="best responses, rankings or preference pairs by the rewards of a model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Rank the responses to each prompt by their rewards and write the best ones.\n"
            "Reads what score reads: lists of responses, or one response per row; rows with\n"
            "the same prompt are then ranked together. Layouts of the output:\n"
            "  best     a row per response: prompt, response, reward, rank\n"
            "  ranked   a row per prompt: prompt, responses, rewards, ranks\n"
            "  pairs    a row per pair: prompt, chosen, rejected, reward_chosen,\n"
            "           reward_rejected, margin; train and TRL read them\n"
            "  rm-gallery rank --model MODEL samples.jsonl --output best.jsonl\n"
            "  rm-gallery rank --model MODEL samples.jsonl --output dpo.parquet \\\n"
            "      --layout pairs --min-margin 1\n"
            "MODEL is what score takes, an ensemble A+B, or a reward server. Without a model,\n"
            "--rewards names the column of rewards in outputs of score. Rerun a stopped\n"
            "command to resume. What ties and rows without a reward do: docs/ranking.md."
        ),
    )
    _add_models_and_files(command, needs_model=False)
    command.add_argument(
        "--rewards",
        metavar="COLUMN",
        help="rewards that the input has, instead of --model; of pairs COLUMN_chosen, ...",
    )
    command.add_argument("--layout", default="best", metavar="NAME", help="best (default), ranked or pairs")
    command.add_argument("--top", type=int, metavar="K", help="responses per prompt (best: 1; ranked: all)")
    command.add_argument("--min-reward", type=float, metavar="X", help="lowest reward; in pairs, of chosen")
    command.add_argument(
        "--min-quantile", type=float, metavar="Q", help="the same as a quantile of the file's rewards (0.9: best tenth)"
    )
    command.add_argument("--pairs", metavar="NAME", help="best_worst (default) or all pairs of a prompt")
    command.add_argument("--min-margin", type=float, metavar="X", help="lowest difference of a pair's rewards")
    command.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="columns of the input to copy into the output"
    )
    add_loading_options(command)
    command.set_defaults(run=_rank, words="inputs", when_stopped="rerun the command to resume")


def _add_models_and_files(command: argparse.ArgumentParser, *, needs_model: bool = True) -> None:
    command.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, folder, glob, URL or hub dataset; or data.KEY=VALUE"
    )
    command.add_argument(
        "--model",
        action="append",
        required=needs_model,
        default=None if needs_model else [],
        metavar="MODEL",
        help="folder, run, hub model or server; repeat for several",
    )
    command.add_argument("--output", required=True, metavar="PATH", help="output folder, or a file for a single input")
    add_weights(command)
    add_ensemble_options(command, "subtract the mean of the validation rewards, divide by their std")
    command.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a server's model: texts are tokenized as in training"
    )
    command.add_argument("--engine", default="local", metavar="NAME", help="local (default), or ray: a Ray cluster")
    command.add_argument("--processes", type=int, metavar="N", help="workers, each with the model and, if any, a GPU")
    command.add_argument("--debug", action="store_true", help="print tracebacks and debug messages")


def add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        type=_weights,
        metavar="NAME=W,...",
        help="of a model's attributes in the reward, which is their sum",
    )


def _weights(text: str) -> dict[str, float]:
    """`helpfulness=0.65,verbosity=-0.1` as a mapping."""
    try:
        pairs = [(name.strip(), float(value)) for name, _, value in (part.rpartition("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be NAME=NUMBER,..., e.g. helpfulness=0.65,verbosity=-0.1"
        ) from None
    if len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice; give it once")
    return dict(pairs)


def _score(arguments: argparse.Namespace) -> None:
    _run(replace(_options(arguments), best=arguments.best))


def _rank(arguments: argparse.Namespace) -> None:
    from rm_gallery.scoring.rank_files import with_ranking
    from rm_gallery.scoring.ranking import Ranking

    names = ("layout", "top", "min_reward", "min_quantile", "pairs", "min_margin")
    ranking = Ranking(**{name: getattr(arguments, name) for name in names}, columns=tuple(arguments.columns))
    _run(with_ranking(replace(_options(arguments), rewards=arguments.rewards), ranking))


def _options(arguments: argparse.Namespace) -> ScoreOptions:
    from rm_gallery.scoring.jobs import ScoreOptions
    from rm_gallery.scoring.score_files import load_data_config

    settings = [
        text for text in arguments.inputs if re.match(r"\+*(data|model|objective|optim|trainer)(\.\w+)+=", text)
    ]
    return ScoreOptions(
        models=tuple(arguments.model),
        inputs=tuple(text for text in arguments.inputs if text not in settings),
        output=arguments.output,
        device=arguments.device,
        dtype=arguments.dtype,
        token_budget=arguments.token_budget,
        trust_remote_code=arguments.trust_remote_code,
        base=arguments.base,
        quantized=not arguments.unquantized,
        template_date=arguments.template_date,
        normalize=arguments.normalize,
        ensemble=arguments.ensemble,
        weights=arguments.weights,
        tokenizer=arguments.tokenizer,
        engine=arguments.engine,
        processes=arguments.processes,
        data=load_data_config(settings),
    )


def _run(options: ScoreOptions) -> None:
    from rm_gallery.safe_text import safe
    from rm_gallery.scoring.score_files import check_any_scored, score_files, summarize

    scored = score_files(options)
    for line in summarize(scored):
        print(safe(line))
    check_any_scored(scored)
