"""`rm-gallery score`: rewards of files. Rewards are saved in parts; the output is written atomically at the end.

While a file is scored, `.NAME.parts/` next to its output has one folder per model with parts: the rewards of
consecutive rows (see parts.py). The name of such a folder is a fingerprint of input, weights and settings. The same
command therefore resumes after the last part, and another command never uses these parts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rm_gallery import config, files
from rm_gallery.data.config import DataConfig
from rm_gallery.data.sources import DataFile, FileEntry, resolve_entries
from rm_gallery.data.sources.local import exists_here
from rm_gallery.errors import Dropped, Problem, UserError
from rm_gallery.progress_bar import ProgressBar
from rm_gallery.scoring.ensemble import ENSEMBLE, Reduction
from rm_gallery.scoring.jobs import (
    ComputeSettings,
    ScoreOptions,
    ScoringJob,
    find_settings,
    lock_output,
    output_columns,
    plan_jobs,
)
from rm_gallery.scoring.model_folder import GivenRewards, ModelFolder, ServedModel
from rm_gallery.scoring.models import check_models, find_attributes, find_ensemble, name_all, open_models
from rm_gallery.scoring.parts import REASON, Block, Parts, blocks, cannot_write, combine_parts
from rm_gallery.scoring.preferences import Agreement, measure
from rm_gallery.scoring.ranking import RankCounts, write_ranked
from rm_gallery.scoring.tables import (
    KEY,
    PARQUET,
    InputTable,
    ScoreDataConfig,
    open_table,
    write_output,
)
from rm_gallery.scoring.workers import FromColumns, InProcess, LocalPool, Workers, WorkerSpec

log = logging.getLogger(__name__)

# A part, the maximum work lost in a crash, ends at the row that reaches either limit.
_MAX_ROWS = 4096
_PACKS_PER_PART, _CHARS_PER_TOKEN = 8, 4


@dataclass(frozen=True)
class _Settings:
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)


def load_data_config(settings: Sequence[str]) -> ScoreDataConfig:
    """How rows are read, from `data.KEY=VALUE` settings; raises UserError that lists all problems."""
    if not settings:
        return ScoreDataConfig()  # without importing Hydra
    answers = [answer for key in settings if (answer := _answer_key(key.partition("=")[0].lstrip("+~")))]
    if answers:
        raise UserError("\n".join(answers))
    return config.load(_Settings, None, settings, check=_problems).data


_ANSWERS = {
    "data.train_files": "score reads the files that it gets as arguments; give the path alone",
    "data.val_files": "score reads the files that it gets as arguments; give the path alone",
    "data.train_split": "set data.split instead",
    "data.val_split": "set data.split instead",
    "data.max_length": "score uses every text in full; remove it",
    "data.truncation": "score uses every text in full; remove it",
    "data.filter_overlong_prompts": "score uses every text in full; remove it",
    "data.chat_template": "score uses the chat template of the model folder; remove it",
    "data.max_tokens_per_micro_batch": "set --token-budget instead",
    "model.partial_pretrain": "name the model with --model",
    "model.trust_remote_code": "set --trust-remote-code instead",
    "data.template_date": "set --template-date instead",
}


def _answer_key(key: str) -> str:
    """What to do about a key of train that score does not have; '' for any other key."""
    section, _, name = key.partition(".")
    is_of_train = section != "data" or name in {each.name for each in fields(DataConfig)}
    if not is_of_train or name in {each.name for each in fields(ScoreDataConfig)}:
        return ""
    return f"{key}: {_ANSWERS.get(key, 'a key of train, which scoring does not depend on; remove it')}"


def _problems(settings: _Settings) -> Iterator[Problem]:
    if settings.data.custom_cls.path or settings.data.custom_cls.name:
        yield Problem(
            "data.custom_cls",
            "data.custom_cls: score reads no custom class; write the rows as messages, or use RewardScorer in Python",
        )


@dataclass(frozen=True)
class ScoredFile:
    """A finished output."""

    output: Path
    num_rows: int
    unscored: dict[str, Dropped]
    """Rows without a reward, by model."""
    agreement: dict[str, Agreement]
    """By model, if rows say which response is better."""
    was_there: bool = False
    """Whether an earlier run wrote it."""
    ranked: RankCounts | None = None
    """Of an output with rankings."""

    def __str__(self) -> str:
        what = f"{self.num_rows} rows" if self.ranked is None else str(self.ranked)
        lines = [f"{self.output}: {what}" + (", already scored" if self.was_there else "")]
        for model, unscored in self.unscored.items():
            if unscored.total:
                lines.append(f"  {model}: {unscored.total} without a reward: {unscored.describe()}")
            if model in self.agreement:
                lines.append(f"  {model}: {self.agreement[model]}")
        return "\n".join(lines)


def summarize(scored: Sequence[ScoredFile]) -> Iterator[str]:
    """Lines on the outputs of a command: each of them, then the accuracy over all files that have one."""
    yield from map(str, scored)
    total: dict[str, Agreement] = {}
    for each in scored:
        for model, agreement in each.agreement.items():
            total.setdefault(model, Agreement()).merge(agreement)
    if sum(bool(each.agreement) for each in scored) > 1:
        yield "all files:"
        yield from (f"  {model}: {agreement}" for model, agreement in total.items())


def check_any_scored(scored: Sequence[ScoredFile]) -> None:
    """Raise UserError if a model gave no row of a file a reward, or if a ranked output has no row."""
    without = [
        f"{each.output}: no row has a reward{f' of {model}' if len(each.unscored) > 1 else ''}: {unscored.describe(1)}"
        for each in scored
        for model, unscored in each.unscored.items()
        if unscored.total == each.num_rows
    ]
    if without:
        more = f" (and {len(without) - 1} more outputs, see above)" if len(without) > 1 else ""
        raise UserError(f"{without[0]}{more}; fix the rows, or set the column names with data.KEY=NAME")
    empty = next((each for each in scored if each.ranked is not None and not each.ranked.rows), None)
    if empty is not None and empty.ranked is not None:
        raise UserError(f"{empty.output}: no rows: {empty.ranked.empty.describe()}; lower the threshold")


def score_files(options: ScoreOptions, *, on_part: Callable[[int], None] | None = None) -> list[ScoredFile]:
    """Score every input with every model; resumes an earlier run of the same command.

    on_part: called with the number of rows after each part is written.
    Raises UserError for invalid inputs, models and outputs, and for an output that another command is writing, before
    scoring starts.
    """
    options, models = open_models(options)
    said: set[str] = set()
    attributes = find_attributes(options)
    tables = [open_table(file, options.data, said, best=options.best) for file in _find_inputs(options)]
    tables = [replace(table, attributes=attributes) for table in tables]
    if options.rewards is not None:  # which the labels may be
        tables = [replace(table, label_format="") for table in tables]
    names = name_all(options.models) or [str(options.rewards)]
    reduction, scale = find_ensemble(options, names)
    jobs = plan_jobs(options, tables, names, models, scale)
    named = names if reduction is None else [*names, ENSEMBLE]
    with ExitStack() as locks:
        for job in jobs:
            if not job.is_done():  # finished outputs may be on a file system that is read-only by now
                locks.enter_context(lock_output(job))
        finished = {job.output: job.is_done() for job in jobs}  # again: another command may have held the lock
        if not all(finished.values()):
            settings = find_settings(options)
            check_models(options)
            for number, name in enumerate(names):
                with _open_workers(options, models[number], settings) as workers:
                    for job in jobs:
                        if finished[job.output]:
                            continue
                        parts = job.parts(number, settings)
                        _score_table(job, parts, workers, name if len(names) > 1 else "", settings, on_part)
                        models[number].check_unchanged()
                        if number == len(names) - 1:
                            found = [job.parts(each, settings) for each in range(len(names))]
                            if reduction is not None:
                                found.append(_combine(job, found, reduction, scale))
                            _finish(job, named, found)
        return [_describe(job, named, finished[job.output]) for job in jobs]


def _open_workers(
    options: ScoreOptions, model: ModelFolder | ServedModel | GivenRewards, settings: ComputeSettings
) -> Workers:
    """The workers of `--engine` and `--processes`. Raises UserError for values that do not fit together."""
    if isinstance(model, GivenRewards):
        return FromColumns(model)
    count = options.processes
    if count is not None and count < 1:
        raise UserError(f"--processes {count}: must be at least 1")
    if options.engine == "local":
        if (count or 1) == 1:
            return InProcess(options, model)
        return LocalPool(WorkerSpec(options, model, model.fingerprint), count or 1)
    if options.engine != "ray":
        raise UserError(f"--engine {options.engine}: must be local or ray")
    from rm_gallery.scoring.ray_workers import RayPool

    return RayPool(WorkerSpec(options, model, model.fingerprint), count, settings)


def _combine(
    job: ScoringJob, parts: Sequence[Parts], reduction: Reduction, scale: list[tuple[float, float]] | None
) -> Parts:
    """The parts of the ensemble, from those of the models."""
    found = job.ensemble_parts()

    def combine(rewards: list[list[float]]) -> list[list[float]]:
        return [list(each) for each in reduction.of(rewards, scale)]

    try:
        combine_parts(parts, found, job.table.base_columns, combine)
    except OSError as error:
        raise cannot_write(job.output, error) from error
    return found


def _find_inputs(options: ScoreOptions) -> list[DataFile]:
    data = options.data
    for text in options.inputs:
        if text.startswith(("{", "[")) and not exists_here(text):
            raise UserError(
                f"INPUT={text}: score takes paths as separate arguments, without weights, since every row is scored "
                "once; set a split, subset, revision or format with data.KEY=VALUE"
            )
    entries = [FileEntry(path, split=data.split, subset=data.subset, revision=data.revision) for path in options.inputs]
    return resolve_entries(entries, key=KEY, max_row_bytes=data.max_row_bytes)


def _score_table(
    job: ScoringJob,
    parts: Parts,
    workers: Workers,
    name: str,
    settings: ComputeSettings,
    on_part: Callable[[int], None] | None,
) -> None:
    """Score the rows that have no part yet."""
    table = job.table
    try:
        parts.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(job.output, error) from error
    starts: set[int] = set()
    progress: ProgressBar | None = None
    with ExitStack() as stack:

        def missing() -> Iterator[Block]:
            nonlocal progress
            max_chars = _CHARS_PER_TOKEN * _PACKS_PER_PART * settings.token_budget
            for block in blocks(table.rows(), max_rows=_MAX_ROWS, max_chars=max_chars):
                starts.add(block.start)
                if not parts.hold(block):
                    if progress is None:
                        progress = stack.enter_context(_start(table, block.start, name, workers))
                    yield block
                elif progress is not None:
                    progress.advance(len(block.rows))

        for block, results in workers.score(job, missing()):
            parts.write(block, results)
            if on_part is not None:
                on_part(len(block.rows))
            if progress is not None:
                progress.advance(len(block.rows))
        if progress is not None:
            log.info("%s: scored, %.1f rows/s", table.file.name, progress.rate)
    parts.keep_only(starts)


def _start(table: InputTable, start: int, name: str, workers: Workers) -> ProgressBar:
    """Load the model, log what follows, and start the progress bar."""
    workers.load()
    log.info("%s: scoring %d rows", table.file.name, table.num_rows)
    if start:
        log.info("%s: resuming after row %d", table.file.name, start - 1)
    title = f"{name} {Path(table.file.name).name}".strip()
    return ProgressBar(title, table.num_rows, start, log_unit="rows")


def _finish(job: ScoringJob, names: Sequence[str], parts: Sequence[Parts]) -> None:
    """Write the output atomically and remove the parts."""
    tables = [job.ensemble_table if job.ensemble and name == ENSEMBLE else job.table for name in names]
    columns = [output_columns(table, name, len(names)) for table, name in zip(tables, names, strict=True)]
    folder, extra = job.parts_folder, dict[str, Any]()
    try:
        with files.atomic_write(job.output, temporary=folder / f"output.{os.getpid()}.tmp") as temporary:
            is_parquet = job.output.suffix in PARQUET
            if job.ranking is None:
                write_output(job.table, temporary, parts, columns, parquet=is_parquet)
            else:
                ranked = write_ranked(job.table, temporary, parts[-1], job.ranking, parquet=is_parquet)
                extra = {"ranked": ranked.as_record()}
            unscored = {name: _count_reasons(job.table, each) for name, each in zip(names, parts, strict=True)}
            agreement = {name: measure(job.table, each) for name, each in zip(names, parts, strict=True)}
            record = {
                "fingerprint": job.fingerprint,
                "sha256": files.sha256(temporary),
                "unscored": {name: [dropped.counts, dropped.examples] for name, dropped in unscored.items()},
                "agreement": {name: each.as_record() for name, each in agreement.items() if each is not None},
                **extra,
            }
            files.write_text(job.marker, json.dumps(record) + "\n")
    except OSError as error:
        raise cannot_write(job.output, error) from error
    shutil.rmtree(folder, ignore_errors=True)
    for name, dropped in unscored.items():
        if dropped.total:
            of_model = f" of {name}" if len(names) > 1 else ""
            log.warning(
                "%s: %d of %d rows have no reward%s: %s",
                job.table.file.name, dropped.total, job.table.num_rows, of_model, dropped.describe(),
            )  # fmt: skip


def _count_reasons(table: InputTable, parts: Parts) -> Dropped:
    unscored, row = Dropped(), 0
    for part in parts.read():
        for reason in part[REASON].to_pylist():
            if reason is not None:
                unscored.add(reason, f"{table.file.name}:{row}")
            row += 1
    return unscored


def _describe(job: ScoringJob, names: Sequence[str], was_there: bool) -> ScoredFile:
    record = json.loads(job.marker.read_text(encoding="utf-8"))
    unscored = {name: Dropped(*record["unscored"][name]) for name in names}
    agreement = {name: Agreement.from_record(each) for name, each in record.get("agreement", {}).items()}
    ranked = RankCounts.from_record(record["ranked"]) if job.ranking is not None else None
    return ScoredFile(job.output, job.table.num_rows, unscored, agreement, was_there, ranked)
