"""`evaluate`: scores sets with models and computes the figures of the report.

The result is a dict of JSON values, `Evaluation`; docs/evaluate.md describes it. It holds all that a report shows:

    models[*].sets[*]    name, n, accuracy, interval, ..., one row per model and set; see `_set_row`
    comparisons[*]       the first model against each other one, per set
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery import __version__
from rm_gallery.data.benchmarks.best_of_n import best_of_n
from rm_gallery.data.benchmarks.scores import with_prior_sets
from rm_gallery.data.benchmarks.table import Table
from rm_gallery.errors import Dropped, UserError
from rm_gallery.evaluation import metrics
from rm_gallery.evaluation.collect import Collected, Sink, collect, margins_by_place
from rm_gallery.evaluation.compare import compare, shared_comparisons
from rm_gallery.evaluation.findings import findings_of
from rm_gallery.evaluation.length import length_report
from rm_gallery.evaluation.probes import DEFAULT_PAIRS, run_probes
from rm_gallery.evaluation.scorers import Scorer, ScorerOptions, check_models, name_scorers, open_scorer
from rm_gallery.evaluation.sets import EvalSet, load_data_config, open_sets
from rm_gallery.inspection.baselines import baseline_report
from rm_gallery.training.run_dir import package_versions

log = logging.getLogger(__name__)

FORMAT = 1
_MAX_STRENGTHS = 6


class Evaluation(dict[str, Any]):
    """The figures of an evaluation, as JSON values; `print` shows them as a report."""

    def __str__(self) -> str:
        from rm_gallery.evaluation.report import as_text

        return as_text(self)

    def save(self, path: str | Path) -> None:
        """Write a report atomically: a page for a name that ends in `.html`, Markdown for `.md`, else JSON."""
        from rm_gallery.evaluation.report_files import check_target, text_of, write_report

        kind = {".html": "html", ".md": "markdown"}.get(Path(path).suffix.lower(), "json")
        target = check_target(str(path), "path", kind)
        write_report(target, text_of(self, kind, target), "path")


@dataclass(frozen=True)
class EvaluateOptions:
    """How an evaluation is done."""

    max_pairs: int | None = None
    """Size of a random sample of the rows of each set."""
    probe_pairs: int | None = None
    """Comparisons of each set that are scored again with changed texts; 0 for none. None for 200, and none for graders,
    whose every request may cost money."""
    baselines: bool = True
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for a number out of range."""
        if self.max_pairs is not None and self.max_pairs < 1:
            raise UserError(f"--max-pairs={self.max_pairs}: must be at least 1")
        if self.probe_pairs is not None and self.probe_pairs < 0:
            raise UserError(f"--probe-pairs={self.probe_pairs}: must be at least 0")

    def probes_of(self, scorer: Scorer) -> int:
        """The number of comparisons for the probes of a scorer."""
        if self.probe_pairs is None:
            return 0 if scorer.kind == "grader" else DEFAULT_PAIRS
        return self.probe_pairs


def evaluate(
    model: Any,
    sets: Any,
    *,
    data: Mapping[str, Any] | None = None,
    max_pairs: int | None = None,
    probes: bool | int | None = None,
    baselines: bool = True,
    seed: int = 0,
    **loading: Any,
) -> Evaluation:
    """How good a reward model is on sets of preferences: accuracy, calibration, biases, and what fools it.

    model: a model folder or hub name (a checkpoint, a run, an adapter, any classifier with one label), an ensemble
    "a+b", a RewardScorer, a grader, a function from a list of conversations to one reward each, a list of these to
    compare, or a mapping from names to them.
    sets: a file, folder, URL or hub dataset with preferences in any format that training reads, the name of a benchmark
    ("rewardbench-2", or "rewardbench-2=FOLDER"), rows in memory, a list of these, or a mapping from names to them.
    data: how rows are read, e.g. {"chosen_key": "better"}. max_pairs: evaluate a random sample of each set.
    probes: whether a sample of 200 pairs is scored again with changed texts, or the size of the sample; None (default)
    is False for graders, whose requests may cost money, and True for others.
    loading: arguments of `RewardScorer.from_folder` (device, dtype, token_budget, weights, ...).

    Returns a dict with `models[*]["sets"][*]`, whose string is a report. Raises `rm_gallery.UserError` for a model or
    set that does not exist or cannot be read, and for a reward that is not finite.

    Example::

        result = evaluate("checkpoints/bt/my-rm", "test.parquet")
        print(result["models"][0]["sets"][0]["accuracy"])
    """
    known = {each.name for each in fields(ScorerOptions)}
    unknown = next((name for name in loading if name not in known), None)
    if unknown is not None:
        raise TypeError(f"evaluate() got an unexpected keyword argument {unknown!r}")
    names, models = _models(model)
    config = load_data_config([f"data.{key}={json.dumps(value)}" for key, value in (data or {}).items()])
    probe_pairs = DEFAULT_PAIRS if probes is True else None if probes is None else int(probes)
    options = EvaluateOptions(max_pairs, probe_pairs, baselines, seed)
    with tempfile.TemporaryDirectory(prefix="rm-gallery-") as folder:
        opened = open_sets(sets, config, max_items=max_pairs, seed=seed, folder=Path(folder))
        return run(models, opened, options, ScorerOptions(**loading), names=names)


def _models(model: Any) -> tuple[list[str] | None, list[Any]]:
    if isinstance(model, Mapping):
        return [str(name) for name in model], list(model.values())
    return None, list(model) if isinstance(model, list | tuple) else [model]


def run(
    models: Sequence[Any],
    sets: Sequence[EvalSet],
    options: EvaluateOptions,
    loading: ScorerOptions,
    *,
    names: Sequence[str] | None = None,
    sink: Sink | None = None,
) -> Evaluation:
    """Evaluate every model on every set, one model after the other, so that one is in memory at a time.

    sink: called with every scored row.
    """
    options.check()
    if not models:
        raise UserError("no model to evaluate; name one with --model")
    names = names or name_scorers(models)
    reference: dict[str, Collected] = {}
    baselines: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for model, name in zip(check_models(models, loading), names, strict=True):
        scorer = open_scorer(model, name, loading)
        with contextlib.closing(scorer):
            rows = []
            for each in sets:
                first = reference.get(each.name)
                others = margins_by_place(first.table, first.table.margins(first.rewards)) if first else None
                num_probe_pairs = options.probes_of(scorer)
                done = collect(
                    each, scorer, num_probe_pairs=num_probe_pairs, seed=options.seed, others=others, sink=sink
                )
                if options.baselines and each.name not in baselines:
                    baselines[each.name] = _baselines(done, options.seed)
                rows.append(_set_row(each, done, scorer, options, baselines.get(each.name)))
                if first is None:
                    reference[each.name] = done
                else:
                    comparisons.append(_comparison((names[0], name), each.name, first, done, options.seed))
            _add_prior_sets(rows)
            found.append({"name": name, **_about(scorer), "sets": rows})
    return Evaluation(
        format=FORMAT,
        rm_gallery=__version__,
        versions={"python": platform.python_version(), **package_versions("torch", "transformers")},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        options=asdict(options),
        models=found,
        comparisons=comparisons,
    )


def _about(scorer: Scorer) -> dict[str, Any]:
    about: dict[str, Any] = {"source": scorer.source, "kind": scorer.kind}
    engine = getattr(getattr(scorer, "scorer", None), "engine", None)
    if engine is not None:
        about["parameters"] = sum(weight.numel() for weight in engine.model.parameters())
        about["device"] = str(engine.device)
        if engine.record.attributes:
            about["weights"] = dict(zip(engine.record.attributes, engine.weights, strict=True))
        about["dtype"] = str(next(engine.model.parameters()).dtype).removeprefix("torch.")
    return about


def _set_row(
    each: EvalSet, done: Collected, scorer: Scorer, options: EvaluateOptions, baselines: dict[str, Any] | None
) -> dict[str, Any]:
    """All figures of a model on a set."""
    table, rewards = done.table, done.rewards
    margins = table.margins(rewards)
    clusters = metrics.clusters_of(table.prompt[table.group], table.group)
    better, worse = rewards[table.better], rewards[table.worse]
    row: dict[str, Any] = {
        "name": each.name,
        "source": each.source,
        **metrics.accuracy(margins, clusters, seed=options.seed),
        "groups": table.num_groups,
        "prompts": len(np.unique(table.prompt)),
        "dropped": _dropped(done.reading.dropped),
        "unscored": _dropped(done.unscored),
    }
    if each.max_items is not None and done.reading.num_usable > each.max_items:
        row["sample_of"] = done.reading.num_usable
    if each.benchmark is not None:
        score = each.benchmark.score(table, rewards)
        notes = [*score.notes, *_incomparable(row, done.unscored)]
        parts = {"score": score.overall, "parts": score.parts, "notes": notes}
        row["benchmark"] = {"name": each.benchmark.name, "title": each.benchmark.title, **parts}
    row["subsets"] = _subsets(table, margins, options.seed)
    row["rewards"] = {"mean": float(rewards.mean()), "std": float(rewards.std()), "n": len(rewards)}
    row["rewards"]["histogram"] = metrics.histogram({"better": better, "worse": worse})
    row["margin_histogram"] = metrics.histogram({"margin": margins})
    row["calibration"] = metrics.calibration(margins, table.p_better)
    lengths = table.length[table.better], table.length[table.worse]
    row["length"] = length_report(margins, *lengths, rewards, table.length, clusters, seed=options.seed)
    row["strength"] = _strength(table, margins)
    row["best_of_n"] = _best_of_n(table, rewards)
    if baselines is not None:
        row["baselines"] = baselines
    if done.probe_pairs:
        row["probes"] = {"pairs": len(done.probe_pairs), "rows": run_probes(done.probe_pairs, scorer)}
    row["mistakes"] = done.mistakes
    row["throughput"] = {
        "scoring_seconds": done.scoring_seconds,
        "seconds": done.seconds,
        "responses_per_second": len(rewards) / max(done.scoring_seconds, 1e-9),
    }
    row["findings"] = [finding.as_dict() for finding in findings_of(row)]
    return row


def _incomparable(row: dict[str, Any], unscored: Dropped) -> list[str]:
    """Why the score of a benchmark is not that of all of its rows."""
    notes = (
        [f"not comparable with published scores: of a sample of {row['sample_of']:,} rows"]
        if "sample_of" in row
        else []
    )
    if unscored.total:
        notes.append(f"not comparable with published scores: {unscored.total:,} rows have no reward")
    return notes


def _dropped(dropped: Dropped) -> dict[str, Any]:
    return {reason: {"n": count, "first": dropped.examples[reason]} for reason, count in dropped.counts.items()}


def _subsets(table: Table, margins: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """A row per subset; none if there is only one."""
    if len(table.subsets) < 2:
        return []
    subset, rows = table.subset_of(), []
    for number, name in enumerate(table.subsets):
        chosen = subset == number
        if chosen.any():
            clusters = metrics.clusters_of(table.prompt[table.group[chosen]], table.group[chosen])
            rows.append({"name": name or "(none)", **metrics.accuracy(margins[chosen], clusters, seed=seed)})
    return rows


def _strength(table: Table, margins: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy by strength of the preference, weak ones first: by value, or by quarter where there are many values."""
    known = np.isfinite(table.strength)
    values = np.unique(table.strength[known])
    if len(values) < 2:
        return []
    edges = (
        values if len(values) <= _MAX_STRENGTHS else np.unique(np.quantile(table.strength[known], [0, 0.25, 0.5, 0.75]))
    )
    rows = []
    for number, low in enumerate(edges):
        high = edges[number + 1] if number + 1 < len(edges) else np.inf
        chosen = known & (table.strength >= low) & (table.strength < high)
        right, count = int((margins[chosen] > 0).sum()), int(chosen.sum())
        if count:
            top = float(table.strength[chosen].max())
            rows.append(
                {"from": float(low), "to": top, "n": count, "accuracy": right / count,
                 "interval": list(metrics.wilson(right, count))}
            )  # fmt: skip
    return rows


def _best_of_n(table: Table, rewards: np.ndarray) -> dict[str, Any] | None:
    """Of the groups of three and more responses whose quality is known; None without any."""
    sizes = np.diff(table.first)
    known = np.add.reduceat(np.isfinite(table.quality).astype(np.int64), table.first[:-1]) == sizes
    groups = known & (sizes > 1)
    if not groups.any() or not (sizes[groups] > 2).any():
        return None
    responses = np.repeat(groups, sizes)
    first = np.concatenate([[0], np.cumsum(sizes[groups])])
    return best_of_n(rewards[responses], table.quality[responses], first)


def _baselines(done: Collected, seed: int) -> dict[str, Any]:
    report = baseline_report(done.baseline_pairs, None, seed=seed)
    rows = [
        {"key": each.key, "title": each.title, "accuracy": each.accuracy, "standard_error": each.standard_error,
         "n": each.num_pairs}
        for each in report.baselines
    ]  # fmt: skip
    notes = [note.replace("training pairs", "pairs") for note in report.notes]
    return {"rows": rows, "notes": notes, "by_prompt": report.by_prompt}


def _comparison(
    names: tuple[str, str], set_name: str, first: Collected, second: Collected, seed: int
) -> dict[str, Any]:
    one, two = shared_comparisons(first.table, second.table)
    if not len(one):
        raise UserError(f"{set_name}: models {names[0]} and {names[1]} have no comparison in common")
    margins = first.table.margins(first.rewards)[one], second.table.margins(second.rewards)[two]
    row = compare(names, first.table, *margins, one, seed=seed)
    return {"set": set_name, **row, "disagreements": second.disagreements}


def _add_prior_sets(rows: Sequence[dict[str, Any]]) -> None:
    """The overall score of RewardBench with the prior sets, where both were evaluated."""
    scores = {row["benchmark"]["name"]: row["benchmark"] for row in rows if "benchmark" in row}
    if {"rewardbench", "prior-sets"} <= scores.keys():
        core, prior = scores["rewardbench"], scores["prior-sets"]
        if core["score"] is not None and prior["score"] is not None:
            core["score_with_prior_sets"] = with_prior_sets(core["parts"], prior["score"])
