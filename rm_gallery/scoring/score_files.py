"""Files scored: `rm-gallery score`. Rewards are kept in parts as they come; a whole output appears at once at the end.

While it works, `.NAME.parts/` beside the output holds a folder per model, and in it parts with the rewards of some
rows each. The folder's name is a fingerprint of input, model and precision, so the same command goes on where it
stopped, and another one never takes parts that are not its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.files import atomic_write, write_text
from rm_gallery.progress_bar import Progress
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.tables import (
    JSON_LINES,
    PARQUET,
    Table,
    find_inputs,
    open_table,
    read_group,
    read_values,
    write_output,
)

if TYPE_CHECKING:
    from rm_gallery.scoring.scorer import RewardScorer

log = logging.getLogger(__name__)

REASON = "reason"
_PART_SECONDS = 20.0  # about so much work is lost when the power goes
_FIRST_ROWS, _LEAST_ROWS, _MOST_ROWS = 64, 16, 4096


@dataclass(frozen=True)
class ScoredFile:
    """One output that is done."""

    output: Path
    num_rows: int
    unscored: dict[str, Dropped]
    """Rows without a reward, by model."""
    was_there: bool = False
    """Whether an earlier run had written it."""


def score_files(options: ScoreOptions, *, on_part: Callable[[int], None] | None = None) -> list[ScoredFile]:
    """Score every input with every model; goes on where an earlier run of the same command stopped.

    on_part: called with the number of rows after each part that was written.
    Raises UserError for inputs, models and outputs that cannot be used, before anything long.
    """
    tables = [open_table(path) for path in find_inputs(options.inputs)]
    names = name_models(options.models)
    jobs = plan_jobs(options, tables, names)
    finished = {job.output: job.is_done() for job in jobs}
    for model, name in enumerate(names):
        scorer: RewardScorer | None = None
        for job in jobs:
            if finished[job.output]:
                continue
            if _count_rows(job.parts[model]) < job.table.num_rows:
                scorer = scorer or _load(options, model)
                _score_table(job.table, job.parts[model], scorer, name if len(names) > 1 else "", on_part)
            if model == len(names) - 1:
                _finish(job, names)
        if scorer is not None:
            scorer.close()
    return [_describe(job, names, finished[job.output]) for job in jobs]


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
    table: Table, folder: Path, scorer: RewardScorer, name: str, on_part: Callable[[int], None] | None
) -> None:
    """Score the rows that have no part yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent.parent}: cannot be written to ({error.strerror}); name another --output"
        ) from error
    start = _count_rows(folder)
    log.info("%s: %d rows, reading %s", table.file, table.num_rows, ", ".join(table.needs))
    if start:
        log.info("%s: going on after row %d", table.file, start - 1)
    rows = read_values(table, start)
    size = _FIRST_ROWS
    with Progress(f"{name} {table.file.name}".strip(), table.num_rows, start) as progress:
        while chunk := list(islice(rows, size)):
            began = time.monotonic()
            _write_part(folder / f"{start:012d}.parquet", table, _score_rows(chunk, table, scorer))
            start += len(chunk)
            progress.add(len(chunk))
            if on_part is not None:
                on_part(len(chunk))
            seconds = max(time.monotonic() - began, 1e-3)
            size = max(_LEAST_ROWS, min(_MOST_ROWS, 4 * size, int(size * _PART_SECONDS / seconds)))
        log.info("%s: scored, %.1f rows/s", table.file, progress.rate)


def _score_rows(
    chunk: Sequence[Any], table: Table, scorer: RewardScorer
) -> list[tuple[list[float] | None, str | None]]:
    """(rewards, None) of each row, or (None, why there are none)."""
    groups: list[PreferenceGroup] = []
    results: list[tuple[list[float] | None, str | None]] = []
    for values in chunk:
        try:
            groups.append(read_group(values, table, scorer.inputs))
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
            results[index] = (None, "reward that is no finite number")
        else:
            results[index] = (rewards, None)
    return results


def _write_part(path: Path, table: Table, results: Sequence[tuple[list[float] | None, str | None]]) -> None:
    columns: dict[str, pa.Array] = {}
    for place, column in enumerate(table.gives):
        if column == "rewards":
            columns[column] = pa.array([rewards for rewards, _ in results], pa.list_(pa.float32()))
        else:
            columns[column] = pa.array([rewards and rewards[place] for rewards, _ in results], pa.float32())
    columns[REASON] = pa.array([reason for _, reason in results], pa.string())
    try:
        with atomic_write(path) as temporary:
            pq.write_table(pa.table(columns), temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); make room and run the same command again") from error


def _finish(job: Job, names: Sequence[str]) -> None:
    """Write the output atomically, then delete the parts."""
    columns = [reward_columns(job.table, name, len(names)) for name in names]
    unscored = {name: _count_reasons(job.table, folder) for name, folder in zip(names, job.parts, strict=True)}
    record = {
        "fingerprint": job.fingerprint,
        "unscored": {name: [dropped.counts, dropped.examples] for name, dropped in unscored.items()},
    }
    try:
        with atomic_write(job.output, temporary=job.parts[0].parent / f"output.{os.getpid()}.tmp") as temporary:
            write_output(job.table, temporary, [_parts_in(folder) for folder in job.parts], columns)
            write_text(job.marker, json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{job.output}: cannot be written ({error}); make room and run the same command again"
        ) from error
    shutil.rmtree(job.parts[0].parent, ignore_errors=True)


def _count_reasons(table: Table, folder: Path) -> Dropped:
    unscored, row = Dropped(), 0
    for path in _parts_in(folder):
        for reason in pq.read_table(path, columns=[REASON])[REASON].to_pylist():
            if reason is not None:
                unscored.add(reason, f"{table.file}:{row}")
            row += 1
    return unscored


def _describe(job: Job, names: Sequence[str], was_there: bool) -> ScoredFile:
    recorded = json.loads(job.marker.read_text(encoding="utf-8"))["unscored"]
    return ScoredFile(job.output, job.table.num_rows, {name: Dropped(*recorded[name]) for name in names}, was_there)


@dataclass(frozen=True)
class ScoreOptions:
    """What `rm-gallery score` was asked for."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    """A folder; or a file, for one input."""
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Job:
    """One input with its output."""

    table: Table
    output: Path
    parts: list[Path]
    """One folder per model."""
    fingerprint: str

    @property
    def marker(self) -> Path:
        """Says of which inputs and models the output was made."""
        return self.output.with_name(f".{self.output.name}.score.json")

    def is_done(self) -> bool:
        """Whether the output is there; raises UserError when it is somebody else's."""
        if not self.output.exists():
            return False
        try:
            made_of = json.loads(self.marker.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            made_of = None
        if made_of != self.fingerprint:
            raise UserError(
                f"{self.output}: exists, and was not made of this input and these models; "
                "move it away or name another --output"
            )
        return True


def name_models(models: Sequence[str]) -> list[str]:
    """Short names of model folders: the folder's own, with those above it as far as needed to tell them apart.

    Raises UserError for a model that is named twice.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(model))) for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model names the same folder twice; name it once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def plan_jobs(options: ScoreOptions, tables: Sequence[Table], names: Sequence[str]) -> list[Job]:
    """Where each input's rewards and output go.

    Raises UserError for an output that does not suit the inputs, and for columns that are there already.
    """
    output = Path(options.output).expanduser()
    is_file = output.suffix in PARQUET + JSON_LINES and not output.is_dir()
    if is_file and len(tables) > 1:
        raise UserError(f"--output {output}: one file for {len(tables)} inputs; name a folder")
    if is_file and (output.suffix in PARQUET) != tables[0].is_parquet:
        raise UserError(f"--output {output}: the output is written like the input ({tables[0].file.name}); rename it")
    outputs = [output if is_file else output / table.file.name for table in tables]
    same = next((path for path in outputs if outputs.count(path) > 1), None)
    if same is not None:
        raise UserError(f"{same}: two inputs have this name; score them into folders of their own")
    models = [_model_facts(model) for model in options.models]
    jobs = []
    for table, path in zip(tables, outputs, strict=True):
        if path.resolve() == table.file.resolve():
            raise UserError(f"{path}: is the input itself; name another --output")
        columns = [column for name in names for column in reward_columns(table, name, len(names))]
        taken = [column for column in columns if column in table.columns]
        if taken:
            raise UserError(f"{table.file}: has a column {taken[0]!r} already; rename it")
        status = table.file.stat()
        facts = [str(table.file.resolve()), status.st_size, status.st_mtime_ns, options.dtype, options.device]
        prints = [_fingerprint([*facts, model]) for model in models]
        parts = path.with_name(f".{path.name}.parts")
        jobs.append(Job(table, path, [parts / each for each in prints], _fingerprint(prints)))
    return jobs


def reward_columns(table: Table, name: str, num_models: int) -> list[str]:
    """Columns that a model adds; its name goes before them when there are several models."""
    return [f"{name}/{column}" if num_models > 1 else column for column in table.gives]


def _model_facts(model: str) -> list[Any]:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return [model]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]


def _fingerprint(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
