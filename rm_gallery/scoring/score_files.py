"""`rm-gallery score`: rewards of files. Rewards are saved in parts; the output is written atomically at the end.

While a file is scored, `.NAME.parts/` next to its output has one folder per model with parts: the rewards of
consecutive rows. The name of such a folder is a fingerprint of input, settings, model and precision. The same command
therefore resumes after the last part, and another command never uses these parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery import config, files
from rm_gallery.data.formats import RowReader
from rm_gallery.data.sources import DataFile, FileEntry, Row, resolve_entries
from rm_gallery.errors import BadRow, Dropped, Problem, UserError
from rm_gallery.progress_bar import ProgressBar
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.tables import (
    JSON_LINES,
    KEY,
    PARQUET,
    InputTable,
    ScoreDataConfig,
    open_table,
    read_group,
    write_output,
)

if TYPE_CHECKING:
    from rm_gallery.scoring.scorer import RewardScorer

log = logging.getLogger(__name__)

_REASON = "reason"
_PART_S = 20.0  # target duration of a part: the maximum work lost in a crash
_FIRST_ROWS, _MIN_ROWS, _MAX_ROWS = 64, 16, 4096

Result = tuple[list[float] | None, str | None]
"""Rewards of a row and None, or None and the reason."""


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of `rm-gallery score`."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    """Files, folders, globs, URLs and hub datasets."""
    output: str
    """A folder; or a file, for one input."""
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    trust_remote_code: bool = False
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)


@dataclass(frozen=True)
class _Settings:
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)


def load_data_config(settings: Sequence[str]) -> ScoreDataConfig:
    """How rows are read, from `data.KEY=VALUE` settings; raises UserError that lists all problems."""
    if not settings:
        return ScoreDataConfig()  # without importing Hydra
    return config.load(_Settings, None, settings, check=_problems).data


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
    was_there: bool = False
    """Whether an earlier run wrote it."""


def score_files(options: ScoreOptions, *, on_part: Callable[[int], None] | None = None) -> list[ScoredFile]:
    """Score every input with every model; resumes an earlier run of the same command.

    on_part: called with the number of rows after each part is written.
    Raises UserError for invalid inputs, models and outputs, before scoring starts.
    """
    said: set[str] = set()
    tables = [open_table(file, options.data, said) for file in _find_inputs(options)]
    names = name_models(options.models)
    jobs = _plan_jobs(options, tables, names)
    finished = {job.output: job.is_done() for job in jobs}
    for model, name in enumerate(names):
        scorer: RewardScorer | None = None
        for job in jobs:
            if finished[job.output]:
                continue
            if _count_rows(job.parts[model]) < job.table.num_rows:
                scorer = scorer or _load(options, model)
                _score_table(job, model, scorer, name if len(names) > 1 else "", on_part)
            if model == len(names) - 1:
                _finish(job, names)
        if scorer is not None:
            scorer.close()
    return [_describe(job, names, finished[job.output]) for job in jobs]


def _find_inputs(options: ScoreOptions) -> list[DataFile]:
    data = options.data
    entries = [FileEntry(path, split=data.split, subset=data.subset, revision=data.revision) for path in options.inputs]
    return resolve_entries(entries, key=KEY)


def _load(options: ScoreOptions, model: int) -> RewardScorer:
    from rm_gallery.scoring.scorer import RewardScorer

    return RewardScorer.from_folder(
        options.models[model],
        device=options.device,
        dtype=options.dtype,  # type: ignore[arg-type]  # checked there
        token_budget=options.token_budget,
        trust_remote_code=options.trust_remote_code,
    )


def _parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"))


def _count_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in _parts_in(folder))


def _score_table(
    job: ScoringJob, model: int, scorer: RewardScorer, name: str, on_part: Callable[[int], None] | None
) -> None:
    """Score the rows that have no part yet."""
    table, folder = job.table, job.parts[model]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent.parent}: cannot be written to ({error.strerror}); choose another --output"
        ) from error
    start = _count_rows(folder)
    log.info("%s: scoring %d rows", table.file.name, table.num_rows)
    if start:
        log.info("%s: resuming after row %d", table.file.name, start - 1)
    rows, reader = table.rows(start), table.reader(scorer.inputs.style)
    size = _FIRST_ROWS
    title = f"{name} {Path(table.file.name).name}".strip()
    with ProgressBar(title, table.num_rows, start, log_unit="rows") as progress:
        while chunk := list(islice(rows, size)):
            began = time.monotonic()
            _write_part(folder / f"{start:012d}.parquet", table, _score_rows(chunk, job, reader, scorer))
            start += len(chunk)
            progress.advance(len(chunk))
            if on_part is not None:
                on_part(len(chunk))
            seconds = max(time.monotonic() - began, 1e-3)
            size = max(_MIN_ROWS, min(_MAX_ROWS, 4 * size, int(size * _PART_S / seconds)))
        log.info("%s: scored, %.1f rows/s", table.file.name, progress.rate)


def _score_rows(chunk: Sequence[Row], job: ScoringJob, reader: RowReader, scorer: RewardScorer) -> list[Result]:
    """Rewards of each row, or the reason why it has none."""
    groups: list[PreferenceGroup] = []
    results: list[Result] = []
    for row in chunk:
        existing = next((column for column in job.columns if column in row.values), None)
        if existing is not None:
            raise UserError(f"{row.where}: already has a column {existing!r}; rename it")
        try:
            groups.append(read_group(row, reader, scorer.inputs))
            results.append(([], None))
        except BadRow as error:
            results.append((None, str(error)))
    scored = iter(scorer.score_each(groups))
    for index, (_, reason) in enumerate(results):
        if reason is not None:
            continue
        rewards = next(scored)
        if isinstance(rewards, BadRow):
            results[index] = (None, str(rewards))
        elif isinstance(rewards, Exception):
            raise rewards
        elif not all(map(math.isfinite, rewards)):
            results[index] = (None, "reward that is not finite")
        else:
            results[index] = (rewards, None)
    if job.table.config.bad_rows == "error":
        for row, (_, reason) in zip(chunk, results, strict=True):
            if reason is not None:
                raise UserError(f"{row.where}: {reason}; fix the row, or set data.bad_rows=drop for a null reward")
    return results


def _write_part(path: Path, table: InputTable, results: Sequence[Result]) -> None:
    columns: dict[str, pa.Array] = {}
    for place, column in enumerate(table.reward_columns):
        if column == "rewards":
            columns[column] = pa.array([rewards for rewards, _ in results], pa.list_(pa.float32()))
        else:
            columns[column] = pa.array([rewards and rewards[place] for rewards, _ in results], pa.float32())
    columns[_REASON] = pa.array([reason for _, reason in results], pa.string())
    try:
        with files.atomic_write(path) as temporary:
            pq.write_table(pa.table(columns), temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space and rerun the command") from error


def _finish(job: ScoringJob, names: Sequence[str]) -> None:
    """Write the output atomically and remove the parts."""
    columns = [reward_columns(job.table, name, len(names)) for name in names]
    unscored = {name: _count_reasons(job.table, folder) for name, folder in zip(names, job.parts, strict=True)}
    folder = job.parts[0].parent
    record = {
        "fingerprint": job.fingerprint,
        "unscored": {name: [dropped.counts, dropped.examples] for name, dropped in unscored.items()},
    }
    try:
        with files.atomic_write(job.output, temporary=folder / f"output.{os.getpid()}.tmp") as temporary:
            parts = [_parts_in(each) for each in job.parts]
            write_output(job.table, temporary, parts, columns, parquet=job.output.suffix in PARQUET)
            files.write_text(job.marker, json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"{job.output}: cannot be written ({error}); free disk space and rerun the command") from error
    shutil.rmtree(folder, ignore_errors=True)


def _count_reasons(table: InputTable, folder: Path) -> Dropped:
    unscored, row = Dropped(), 0
    for path in _parts_in(folder):
        for reason in pq.read_table(path, columns=[_REASON])[_REASON].to_pylist():
            if reason is not None:
                unscored.add(reason, f"{table.file.name}:{row}")
            row += 1
    return unscored


def _describe(job: ScoringJob, names: Sequence[str], was_there: bool) -> ScoredFile:
    recorded = json.loads(job.marker.read_text(encoding="utf-8"))["unscored"]
    return ScoredFile(job.output, job.table.num_rows, {name: Dropped(*recorded[name]) for name in names}, was_there)


@dataclass(frozen=True)
class ScoringJob:
    """One input with its output."""

    table: InputTable
    output: Path
    parts: list[Path]
    """One folder per model."""
    columns: list[str]
    """Columns that the output adds."""
    fingerprint: str

    @property
    def marker(self) -> Path:
        """Records the fingerprint of the output, and its rows without a reward."""
        return self.output.with_name(f".{self.output.name}.score.json")

    def is_done(self) -> bool:
        """Whether the output exists; raises UserError if it is not an output of this command."""
        if not self.output.exists():
            return False
        try:
            fingerprint = json.loads(self.marker.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            fingerprint = None
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{self.output}: exists, and was not made of this input, these models and settings; "
                "move it away or choose another --output"
            )
        return True


def name_models(models: Sequence[str]) -> list[str]:
    """Short names of model folders: the last part of each path, with as many parents as make the names unique.

    `a/x` and `b/y` are `x` and `y`; `a/x` and `b/x` keep both parts. Raises UserError for a repeated model.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(model))) for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model has the same folder twice; give it once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _plan_jobs(options: ScoreOptions, tables: Sequence[InputTable], names: Sequence[str]) -> list[ScoringJob]:
    """Where the rewards and the output of each input go.

    Raises UserError for an output that does not suit the inputs, and for reward columns that exist already.
    """
    output = Path(options.output).expanduser()
    is_file = output.suffix in PARQUET + JSON_LINES and not output.is_dir()
    if is_file and len(tables) > 1:
        raise UserError(f"--output {output}: one file for {len(tables)} inputs; name a folder")
    outputs = [output if is_file else output / table.output_name for table in tables]
    same = next((path for path in outputs if outputs.count(path) > 1), None)
    if same is not None:
        raise UserError(f"{same}: the output of two inputs; score them into different folders")
    models = [_model_facts(model) for model in options.models]
    jobs = []
    for table, path in zip(tables, outputs, strict=True):
        if path.resolve() == Path(table.file.path).resolve():
            raise UserError(f"{path}: is the input itself; choose another --output")
        columns = [column for name in names for column in reward_columns(table, name, len(names))]
        existing = [column for column in columns if column in table.columns]
        if existing:
            raise UserError(f"{table.file.name}: already has a column {existing[0]!r}; rename it")
        facts = [table.file.identity, table.format_name, asdict(table.config), options.dtype, options.device]
        prints = [_fingerprint([*facts, model]) for model in models]
        parts = path.with_name(f".{path.name}.parts")
        jobs.append(ScoringJob(table, path, [parts / each for each in prints], columns, _fingerprint(prints)))
    return jobs


def reward_columns(table: InputTable, name: str, num_models: int) -> list[str]:
    """Columns that a model adds, prefixed with `NAME/` if there are several models."""
    return [f"{name}/{column}" if num_models > 1 else column for column in table.reward_columns]


def _model_facts(model: str) -> list[Any]:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [model]
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]]


def _fingerprint(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
