"""Workers of `rm-gallery score`: blocks of rows become results in this process, in several, or on Ray.

A part is a function of its rows, so any number of workers write the same parts. They are written by the process of the
command alone, each atomically, so a block of a worker that died is scored by another one, once.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from rm_gallery.data.formats import RowReader
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError
from rm_gallery.log import setup_logging
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.base import BaseScorer
from rm_gallery.scoring.jobs import ScoreOptions, ScoringJob
from rm_gallery.scoring.model_folder import GivenRewards, ModelFolder, ServedModel
from rm_gallery.scoring.models import LazyScorer
from rm_gallery.scoring.parts import Block, Result
from rm_gallery.scoring.tables import read_group

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of workers that score the same block


class Workers(ABC):
    """Score the blocks of one model."""

    def load(self) -> None:  # noqa: B027 - workers in processes of their own load it there
        """Load the model, where it is in this process."""

    @abstractmethod
    def score(self, job: ScoringJob, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[Result]]]:
        """The results of each block, as they are ready. Raises UserError for rows that stop the command."""

    @abstractmethod
    def close(self) -> None:
        """Free models and processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InProcess(Workers):
    """Scores in this process."""

    def __init__(self, options: ScoreOptions, model: ModelFolder | ServedModel) -> None:
        self._scorer = LazyScorer(options, model)

    def load(self) -> None:
        self._scorer.get()

    def score(self, job: ScoringJob, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[Result]]]:
        for block in blocks:
            yield block, score_block(self._scorer, job, block.rows)

    def close(self) -> None:
        self._scorer.close()


class FromColumns(Workers):
    """Reads the rewards that the rows have."""

    def __init__(self, given: GivenRewards) -> None:
        self._column = given.model

    def score(self, job: ScoringJob, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[Result]]]:
        columns = [self._column + base.removeprefix("reward") for base in job.table.base_columns]  # reward_chosen
        if job.table.base_columns == ("rewards",):
            columns = [self._column]
        missing = next((each for each in columns if each not in job.table.columns), None)
        if missing is not None:
            raise UserError(
                f"{job.table.file.name}: --rewards {self._column}: no column {missing!r} (columns: "
                f"{', '.join(job.table.columns)})"
            )
        reader = job.table.reader("chat")
        for block in blocks:
            yield block, [(_given_rewards(row, columns, reader), None) for row in block.rows]

    def close(self) -> None:
        """Nothing to free."""


def _given_rewards(row: Row, columns: Sequence[str], reader: RowReader) -> list[float]:
    """The rewards of the responses of a row. Raises UserError for one without, since ranks would then be of others."""
    values: list[Any] = [row.values.get(column) for column in columns]
    found: list[Any] = values[0] if isinstance(values[0], list) else values
    where = f"{row.where}: --rewards {columns[0]}"
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or not _is_finite(value):
            shown = "no reward" if value is None else f"{value!r:.40} is not a finite number"
            raise UserError(f"{where}: {shown}; remove the row, or rank with --model")
    try:
        count = len(reader.read(row).responses)
    except BadRow as error:
        raise UserError(f"{where}: the row cannot be ranked: {error}") from error
    if count != len(found):
        raise UserError(f"{where}: {len(found)} rewards for {count} responses; fix the row, or rank with --model")
    return [float(value) for value in found]


def _is_finite(value: float | str) -> bool:
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to score; can be pickled."""

    options: ScoreOptions
    model: ModelFolder | ServedModel
    fingerprint: list[Any]
    """Of the model, as the command read it."""

    def open(self) -> LazyScorer:
        """The scorer of a worker. Raises UserError if its model folder is not that of the command."""
        self.model.__dict__.pop("fingerprint", None)
        if self.model.fingerprint != self.fingerprint:
            raise UserError(
                f"model={self.model.model}: the folder of a worker ({os.uname().nodename}) differs from that of the "
                "command; all machines need the same files at this path"
            )
        return LazyScorer(self.options, self.model)


class Pool(Workers):
    """Several workers, each with a model of its own. A worker that dies is replaced, and its block scored again."""

    def __init__(self, spec: WorkerSpec, count: int) -> None:
        self.spec, self._count = spec, count
        self._idle: list[Any] = []

    @abstractmethod
    def start(self, number: int) -> Any:
        """A new worker. number: 0 to the number of workers - 1."""

    @abstractmethod
    def send(self, worker: Any, job: ScoringJob, rows: list[Row]) -> Any:
        """Start to score a block; returns what `wait` takes."""

    @abstractmethod
    def wait(self, sent: Sequence[Any]) -> list[tuple[Any, list[Result] | Exception | None]]:
        """Wait for at least one of `sent`: each that is ready, with its results or error; None if its worker died."""

    @abstractmethod
    def stop(self, worker: Any) -> None:
        """End a worker."""

    def score(self, job: ScoringJob, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[Result]]]:
        """See `Workers.score`."""
        again: deque[Block] = deque()
        busy: dict[Any, tuple[int, Any, Block]] = {}
        deaths: dict[int, int] = {}
        idle = list(range(self._count))
        while True:
            while idle and (block := again.popleft() if again else next(blocks, None)) is not None:
                number = idle.pop(0)
                worker = self._workers()[number]
                busy[self.send(worker, job, block.rows)] = number, worker, block
            if not busy:
                return
            for sent, results in self.wait(list(busy)):
                number, worker, block = busy.pop(sent)
                if results is None:
                    deaths[block.start] = deaths.get(block.start, 0) + 1
                    self._replace(number, worker, block, deaths[block.start])
                    again.append(block)
                elif isinstance(results, Exception):
                    raise results
                else:
                    yield block, results
                idle.append(number)

    def _workers(self) -> list[Any]:
        if not self._idle:
            log.info("starting %d workers", self._count)
            self._idle = [self.start(number) for number in range(self._count)]
        return self._idle

    def _replace(self, number: int, worker: Any, block: Block, count: int) -> None:
        self.stop(worker)
        rows = f"rows {block.start} to {block.start + len(block.rows) - 1}"
        if count >= _MAX_DEATHS:
            raise UserError(
                f"{count} workers died while they scored {rows}, for example for lack of memory; set a lower "
                "--token-budget or fewer --processes, and rerun the command to resume"
            )
        log.warning("a worker died; its %s are scored again by a new one", rows)
        self._idle[number] = self.start(number)

    def close(self) -> None:
        for worker in self._idle:
            self.stop(worker)
        self._idle = []


class LocalPool(Pool):
    """Processes of this machine; with GPUs, each has one of them in turn."""

    def start(self, number: int) -> Any:
        import multiprocessing

        context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
        ours, theirs = context.Pipe()
        spec = replace(self.spec, options=replace(self.spec.options, device=self._device(number)))
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // self._count)
        process = context.Process(target=_serve, args=(theirs, spec, threads), daemon=True)
        process.start()
        theirs.close()  # or the death of the worker would not end the connection
        return ours, process

    def _device(self, number: int) -> str:
        device = self.spec.options.device
        if device not in ("auto", "cuda") or isinstance(self.spec.model, ServedModel):
            return device
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{number % count}" if count else device

    def send(self, worker: Any, job: ScoringJob, rows: list[Row]) -> Any:
        connection, _ = worker
        with suppress(ConnectionError):  # it died: `wait` says so
            connection.send((job, rows))
        return connection

    def wait(self, sent: Sequence[Any]) -> list[tuple[Any, list[Result] | Exception | None]]:
        from multiprocessing.connection import wait

        found: list[tuple[Any, list[Result] | Exception | None]] = []
        connections: list[Any] = wait(sent)
        for connection in connections:
            try:
                found.append((connection, connection.recv()))
            except (EOFError, ConnectionError):
                found.append((connection, None))
        return found

    def stop(self, worker: Any) -> None:
        connection, process = worker
        connection.close()
        process.kill()
        process.join()


def _serve(connection: Any, spec: WorkerSpec, threads: int | None) -> None:
    """The process of a worker: scores what it gets until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the command stops its workers
    setup_logging(logging.WARNING)
    worker = Worker(spec, threads)
    while True:
        try:
            job, rows = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            connection.send(worker.score(job, rows))
        except ConnectionError:
            return


class Worker:
    """Scores blocks in a process of its own."""

    def __init__(self, spec: WorkerSpec, threads: int | None = None) -> None:
        self._spec, self._threads = spec, threads
        self._scorer: LazyScorer | None = None

    def score(self, job: ScoringJob, rows: list[Row]) -> list[Result] | Exception:
        """The results, or the error that stops the command."""
        try:
            if self._scorer is None:
                if self._threads is not None and "torch" not in sys.modules:
                    os.environ["OMP_NUM_THREADS"] = str(self._threads)
                self._scorer = self._spec.open()
            return score_block(self._scorer, job, rows)
        except UserError as error:
            return error
        except Exception as error:
            log.exception("a worker failed")
            return RuntimeError(f"a worker failed: {type(error).__name__}: {error}")


def score_block(scorer: LazyScorer, job: ScoringJob, rows: Sequence[Row]) -> list[Result]:
    """The results of the rows of a block."""
    found = scorer.get()
    return score_rows(rows, job, job.table.reader(found.inputs.style), found)


def score_rows(chunk: Sequence[Row], job: ScoringJob, reader: RowReader, scorer: BaseScorer) -> list[Result]:
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
    scored = iter(scorer.score_each(groups, attributes=True))
    for index, (_, reason) in enumerate(results):
        if reason is not None:
            continue
        rewards = next(scored)
        if isinstance(rewards, BadRow):
            results[index] = (None, str(rewards))
        elif isinstance(rewards, Exception):
            raise rewards
        elif not rewards:
            results[index] = ([], "no responses")
        else:
            results[index] = (rewards, None)
    if job.table.config.bad_rows == "error":
        for row, (_, reason) in zip(chunk, results, strict=True):
            if reason is not None:
                raise UserError(f"{row.where}: {reason}; fix the row, or set data.bad_rows=drop for a null reward")
    return results
