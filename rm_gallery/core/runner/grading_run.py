"""GradingRun: the workers of one run, which share one pass over the samples."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rm_gallery.core.graders.schema import GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import fingerprint
from rm_gallery.core.runner.base_runner import RunnerResult
from rm_gallery.core.runner.grader_config import GraderConfig
from rm_gallery.core.runner.results_file import ResultsFile
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

LOCAL_IN_FLIGHT = 1024  # calls that wait for a reward model: enough to fill its packs while others are on their way
PAUSE_EVERY = 64  # saved results taken over before other tasks get their turn


@dataclass(frozen=True, slots=True)
class Call:
    """One grader, asked once."""

    index: int
    """Of the sample, from 0."""
    sample: Any
    name: str
    """Of the grader in the configuration."""
    fingerprint: str
    """Of the sample; '' where nothing is saved."""


class GradingRun:
    """A fixed set of workers takes calls from one iterator, so that memory does not grow with the dataset.

    (The results do stay: one per sample and grader.) Each result is saved before its worker takes the next call, so
    that a kill at any moment costs the calls in flight and no other.
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
        """limit: bounds the calls of graders without a local reward model.

        count: called once per result with whether that is an error.
        """
        self.num_samples = 0
        self.results: RunnerResult = {name: [] for name in configs}
        self._samples, self._configs, self._limit, self._saved, self._count = samples, configs, limit, saved, count
        self._is_local = {name: config.is_local for name, config in configs.items()}
        self._num_workers = max_concurrency + (LOCAL_IN_FLIGHT if any(self._is_local.values()) else 0)

    async def to_the_end(self) -> None:
        """Grade all samples. Raises what the dataset or the results file raises; leaves no task behind in any case."""
        calls = self._calls()
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._num_workers):
                    workers.create_task(self._work(calls))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the first failure; the other workers were cancelled for it

    def _calls(self) -> Iterator[Call | None]:
        """All calls to make, in order; None now and then while saved results are taken over instead."""
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
            # A grader that never waits would otherwise keep the loop, and Ctrl-C, until the dataset ends.
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
            return GraderError(name=name, error=f"the mapper failed with {type(error).__name__}: {error}")
        async with contextlib.nullcontext() if self._is_local[call.name] else self._limit:
            try:
                result = await config.grader.aevaluate(**arguments)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                return GraderError(name=name, error="the grader was cancelled from within")
            except Exception as error:
                log.debug("grader %r failed on sample %d", call.name, call.index, exc_info=True)
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                return GraderError(name=name, error=text)
        if not isinstance(result, GraderScore | GraderRank | GraderError):
            what = f"the grader gave {type(result).__name__}, not a GraderScore, GraderRank or GraderError"
            return GraderError(name=name, error=what)
        return result
