"""`rank`: the best responses, rankings or preference pairs of files; the function behind `rm-gallery rank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.scoring.ensemble import members_of
from rm_gallery.scoring.jobs import ScoreOptions
from rm_gallery.scoring.ranking import Ranking
from rm_gallery.scoring.score_files import ScoredFile, check_any_scored, load_data_config, score_files


def rank(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path | Sequence[str | Path] | None,
    output: str | Path,
    *,
    layout: str = "best",
    top: int | None = None,
    min_reward: float | None = None,
    min_quantile: float | None = None,
    pairs: str | None = None,
    min_margin: float | None = None,
    columns: Sequence[str] = (),
    rewards: str | None = None,
    data: Sequence[str] = (),
    **options: Any,
) -> list[ScoredFile]:
    """Rank the responses to each prompt by their rewards and write the best ones, as `rm-gallery rank` does.

    inputs: files, folders, globs, URLs and hub datasets. model: folder, run, hub model, server, or an ensemble `A+B`;
    several with `ensemble=`; None with `rewards=`, the column of rewards that the inputs have. output: a folder; or a
    file, for one input. layout to columns: see `Ranking`.
    data: settings such as `data.prompt_key=question`. options: further fields of `ScoreOptions`.
    A call that was interrupted resumes. Raises UserError for invalid arguments and for outputs without rows.
    """
    models, paths = ([each] if isinstance(each, str | Path) else list(each or ()) for each in (model, inputs))
    ranking = Ranking(layout, top, min_reward, min_quantile, pairs, min_margin, tuple(columns))
    settings = ScoreOptions(
        tuple(map(str, models)),
        tuple(map(str, paths)),
        str(output),
        data=load_data_config(data),
        rewards=rewards,
        **options,
    )
    ranked = score_files(with_ranking(settings, ranking))
    check_any_scored(ranked)
    return ranked


def with_ranking(options: ScoreOptions, ranking: Ranking) -> ScoreOptions:
    """The options of a command that writes rankings. An ensemble `A+B` becomes its models, combined by their mean.

    Raises UserError for several models that are no ensemble, and for rewards from both columns and models.
    """
    ranking.check()
    if (options.rewards is None) == (not options.models):
        raise UserError("rank needs --model, or --rewards with the column of rewards that the input has; give one")
    if options.rewards is not None:
        given = {"--ensemble": options.ensemble, "--normalize": options.normalize, "--weights": options.weights,
                 "--tokenizer": options.tokenizer, "--processes": options.processes,
                 "--engine": options.engine != "local" or None}  # fmt: skip
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None:
            raise UserError(f"{name} is for --model, and --rewards reads the rewards of the input; remove it")
    models, ensemble = options.models, options.ensemble
    members = [member for model in models for member in members_of(model)]
    if len(models) == 1 < len(members):
        models, ensemble = tuple(members), ensemble or "mean"
    elif len(members) > len(models):
        raise UserError("--model: rank takes one ensemble A+B, or its models one by one with --ensemble")
    if len(models) > 1 and ensemble is None:
        raise UserError("--model: rank needs one reward; combine several models with --ensemble mean, lower or min")
    return replace(options, models=models, ensemble=ensemble, ranking=ranking)
