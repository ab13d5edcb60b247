"""GradingRunner: grades many samples with several graders, with bounded concurrency and resumable results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.core.run_sync import run_sync
from rm_gallery.core.runner import fingerprint
from rm_gallery.core.runner.aggregator import BaseAggregator
from rm_gallery.core.runner.grader_config import GraderConfig
from rm_gallery.core.runner.results_file import ResultsFile
from rm_gallery.errors import UserError
from rm_gallery.progress_bar import ProgressBar
from rm_gallery.safe_text import redact

log = logging.getLogger(__name__)


Aggregator: TypeAlias = BaseAggregator | Callable[[dict[str, Any]], Any]
"""From {grader name: result} of one sample to one result, which is listed under the name of the aggregator."""

RunnerResult: TypeAlias = dict[str, list[Any]]
"""Grader or aggregator name -> one result per sample, in the order of the dataset."""


class BaseRunner(ABC):
    """Grades datasets. A subclass implements `arun`."""

    @abstractmethod
    async def arun(self, dataset: Iterable[Any]) -> RunnerResult:
        """Grade every sample. An empty dataset gives empty lists."""

    def run(self, dataset: Iterable[Any]) -> RunnerResult:
        """`arun` as a blocking call."""
        return run_sync(self.arun(dataset))


class GradingRunner(BaseRunner):
    """Grades every sample of a dataset with every grader.

        runner = GradingRunner({"relevance": (RelevanceGrader(model=model), {"query": "q", "response": "answer.text"})})
        results = await runner.arun(dataset)   # {"relevance": [GraderScore(...), ...]}

    A failing sample does not stop the run: an exception in a grader or a mapper becomes a GraderError. A runner can be
    reused, also by several tasks at the same time.
    """

    def __init__(
        self,
        grader_configs: Mapping[str, Any],
        max_concurrency: int = 32,
        aggregators: Aggregator | Sequence[Aggregator] | None = None,
        show_progress: bool = True,
        output_path: str | Path | None = None,
        *,
        retry_errors: bool = False,
    ) -> None:
        """grader_configs: name -> grader, GraderConfig, (grader, mapper), or {"grader": ..., "mapper": ...}.

        max_concurrency: maximum number of concurrent calls, over all graders and runs of this runner in one event loop.
        Graders with a reward model in this process are exempt: their waiting calls fill its packs.
        aggregators: each is called with {grader name: result} of one sample and adds a list of results under its
        `name`, or the name of the function.
        output_path: JSON-lines file to which each result is appended. If it exists, the run resumes from it; samples
        may have been appended to the dataset, other changes are an error.
        retry_errors: when resuming, grade samples again whose saved result is an error.
        Raises UserError for an invalid grader, mapper or aggregator.
        """
        if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise UserError(f"max_concurrency={max_concurrency!r}: must be an integer of at least 1")
        if not isinstance(grader_configs, Mapping) or not grader_configs:
            raise UserError("grader_configs must be a dictionary from names to graders, with at least one")
        self.grader_configs = {name: GraderConfig.create(config, name) for name, config in grader_configs.items()}
        self.max_concurrency = max_concurrency
        self.aggregators = _by_name(aggregators, list(self.grader_configs))
        self.show_progress = show_progress
        self.output_path, self.retry_errors = output_path, retry_errors
        # Computed now: a grader may change its attributes while it grades.
        self._setups = {
            name: fingerprint.of_grader(config.grader, config.mapper)
            for name, config in (self.grader_configs.items() if output_path is not None else ())
        }
        self._limits: dict[asyncio.AbstractEventLoop, tuple[asyncio.Semaphore, int]] = {}

    async def arun(self, dataset: Iterable[Any]) -> RunnerResult:
        """{grader or aggregator name: [result per sample, in order]}; an empty dataset gives empty lists.

        dataset: samples, as a list or an iterable; read lazily.
        Raises UserError for an invalid dataset, for a dataset other than the one in `output_path`, and if results
        cannot be written; exceptions of the dataset are not caught. Cancellation stops all its tasks.
        """
        samples = _samples_of(dataset)
        num_samples = len(dataset) if isinstance(dataset, Sized) else None
        with contextlib.ExitStack() as stack:
            saved = None
            if self.output_path is not None:
                saved = stack.enter_context(ResultsFile(self.output_path, self._setups, retry_errors=self.retry_errors))
                if num_samples is not None:
                    saved.check_length(num_samples)
                if saved.num_saved:
                    log.info("%s: resuming, %d results are saved", saved.path, saved.num_saved)
            total = None if num_samples is None else num_samples * len(self.grader_configs)
            limit = stack.enter_context(self._limit())
            bar = stack.enter_context(ProgressBar("grading", total, show=self.show_progress))
            run = GradingRun(
                samples, self.grader_configs, limit, self.max_concurrency, saved,
                lambda is_error: bar.advance(errors=is_error),
            )  # fmt: skip
            await run.run()
            if saved is not None:
                saved.check_length(run.num_samples)
        _log_errors(run.results)
        return {**run.results, **self._aggregate(run.results, run.num_samples)}

    @contextlib.contextmanager
    def _limit(self) -> Iterator[asyncio.Semaphore]:
        """The semaphore shared by all runs of this runner in this event loop; a semaphore belongs to one loop."""
        loop = asyncio.get_running_loop()
        limit, num_users = self._limits.get(loop, (asyncio.Semaphore(self.max_concurrency), 0))
        self._limits[loop] = (limit, num_users + 1)
        try:
            yield limit
        finally:
            limit, num_users = self._limits.pop(loop)
            if num_users > 1:
                self._limits[loop] = (limit, num_users - 1)

    def _aggregate(self, results: RunnerResult, num_samples: int) -> RunnerResult:
        aggregated: RunnerResult = {name: [] for name in self.aggregators}
        for index in range(num_samples):
            of_sample = {name: results[name][index] for name in self.grader_configs}
            for name, aggregator in self.aggregators.items():
                try:
                    aggregated[name].append(aggregator(dict(of_sample)))
                except Exception as error:
                    why = f"aggregator {name!r} failed with {type(error).__name__}: {error}"
                    aggregated[name].append(GraderError(name=name, error=why))
        return aggregated


def _by_name(aggregators: Any, grader_names: list[str]) -> dict[str, Aggregator]:
    if aggregators is None:
        aggregators = []
    named: dict[str, Aggregator] = {}
    for aggregator in [aggregators] if callable(aggregators) else list(aggregators):
        if not callable(aggregator) or isinstance(aggregator, type):
            raise UserError(
                f"aggregators: {aggregator!r} is not an aggregator; give WeightedSumAggregator(name=..., weights=...) "
                "or a function that takes {grader name: result} of one sample"
            )
        fallback = getattr(aggregator, "__name__", type(aggregator).__name__)
        name = str(getattr(aggregator, "name", fallback))
        if name in named or name in grader_names:
            raise UserError(f"aggregators: the name {name!r} is used twice; choose another")
        if isinstance(aggregator, BaseAggregator):
            aggregator.check(grader_names)
        named[name] = aggregator
    return named


def _samples_of(dataset: Any) -> Iterator[Any]:
    is_table = hasattr(dataset, "to_dict") and hasattr(dataset, "columns")
    if isinstance(dataset, str | bytes | Mapping) or is_table or not isinstance(dataset, Iterable):
        hint = "; for a DataFrame, df.to_dict('records')" if is_table else ""
        raise UserError(
            f"the dataset is of type {type(dataset).__name__}: "
            f"give a list (or anything to iterate over) of dictionaries, one per sample{hint}"
        )
    return iter(dataset)


def _log_errors(results: RunnerResult) -> None:
    """Log one warning per grader with errors."""
    for name, given in results.items():
        errors = [index for index, result in enumerate(given) if isinstance(result, GraderError)]
        if errors:
            log.warning(
                "grader %r: %d of %d samples failed, the first is sample %d: %s",
                name, len(errors), len(given), errors[0], given[errors[0]].error,
            )  # fmt: skip


LOCAL_IN_FLIGHT = 1024  # concurrent calls of a local reward model: enough to fill its packs
PAUSE_EVERY = 64  # saved results taken between two yields to the event loop


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a grader."""

    index: int
    """Of the sample; counts from 0."""
    sample: Any
    name: str
    """Of the grader."""
    fingerprint: str
    """Of the sample; '' without an output_path."""


class GradingRun:
    """One run: a fixed number of workers takes calls from one iterator, so that only results grow with the dataset.

    Each result is saved before its worker takes the next call, so that a killed run loses only the calls in flight.
    """

    def __init__(
        self,
        samples: Iterator[Any],
        configs: Mapping[str, GraderConfig],
        limit: asyncio.Semaphore,
        max_concurrency: int,
        saved: ResultsFile | None,
        count: Callable[[bool], None],
    ) -> None:
        """limit: bounds the concurrent calls of graders without a local reward model.

        count: called once per result, with True for an error.
        """
        self.num_samples = 0
        self.results: RunnerResult = {name: [] for name in configs}
        self._samples, self._configs, self._limit, self._saved, self._count = samples, configs, limit, saved, count
        self._is_local = {name: config.is_local for name, config in configs.items()}
        self._num_workers = max_concurrency + (LOCAL_IN_FLIGHT if any(self._is_local.values()) else 0)

    async def run(self) -> None:
        """Grade all samples. Raises errors of the dataset and the results file; all tasks have ended then."""
        calls = self._calls()
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._num_workers):
                    workers.create_task(self._work(calls))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the first failure; the other workers were cancelled for it

    def _calls(self) -> Iterator[Call | None]:
        """All calls in order; None at intervals while saved results are taken, to let other tasks run."""
        num_taken = 0
        for index, sample in enumerate(self._samples):
            seen = fingerprint.of_sample(sample, index) if self._saved else ""
            self.num_samples += 1
            for results in self.results.values():
                results.append(None)
            for name in self._configs:
                done = self._saved.take(name, index, seen) if self._saved else None
                if done is None:
                    yield Call(index, sample, name, seen)
                    continue
                self._keep(name, index, done)
                num_taken += 1
                if num_taken % PAUSE_EVERY == 0:
                    yield None

    async def _work(self, calls: Iterator[Call | None]) -> None:
        for call in calls:
            # A grader that never awaits would otherwise block the loop, and Ctrl-C, for the whole dataset.
            await asyncio.sleep(0)
            if call is None:
                continue
            result = await self._grade(call)
            if self._saved:
                self._saved.append(call.name, call.index, call.fingerprint, result)
            self._keep(call.name, call.index, result)

    def _keep(self, name: str, index: int, result: Any) -> None:
        self.results[name][index] = result
        self._count(isinstance(result, GraderError))

    async def _grade(self, call: Call) -> GraderScore | GraderRank | GraderError:
        config = self._configs[call.name]
        name = getattr(config.grader, "name", None) or call.name
        try:
            arguments = config.arguments(call.sample)
        except UserError as error:
            return GraderError(name=name, error=str(error))
        except Exception as error:
            return GraderError(name=name, error=redact(f"the mapper failed with {type(error).__name__}: {error}"))
        async with contextlib.nullcontext() if self._is_local[call.name] else self._limit:
            try:
                result = await config.grader.aevaluate(**arguments)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                return GraderError(name=name, error="the grader cancelled itself")
            except Exception as error:
                log.debug("grader %r failed on sample %d", call.name, call.index, exc_info=True)
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                return GraderError(name=name, error=redact(text))
        if not isinstance(result, GraderScore | GraderRank | GraderError):
            what = f"the grader returned {type(result).__name__}, not a GraderScore, GraderRank or GraderError"
            return GraderError(name=name, error=what)
        return result
