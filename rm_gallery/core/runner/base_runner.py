"""BaseRunner: anything that grades a dataset."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeAlias

RunnerResult: TypeAlias = dict[str, list[Any]]
"""Grader or aggregator name -> one result per sample, in the order of the dataset."""


class BaseRunner(ABC):
    """Grades datasets. A subclass writes `arun`."""

    @abstractmethod
    async def arun(self, dataset: Iterable[Any]) -> RunnerResult:
        """Grade every sample. An empty dataset gives empty lists."""

    def run(self, dataset: Iterable[Any]) -> RunnerResult:
        """`arun` for code that does not await; in a running event loop (a notebook) it blocks that loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.arun(dataset))
        return _run_in_thread(self.arun(dataset))


def _run_in_thread(work: Coroutine[Any, Any, RunnerResult]) -> RunnerResult:
    """Run in an event loop of a thread; Ctrl-C here cancels it there, and waits until nothing of it is left."""
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    task = loop.create_task(work)
    may_start = threading.Event()  # once the pool knows its thread: Ctrl-C before that would not wait for it

    def main() -> RunnerResult:
        may_start.wait()
        with runner:
            return loop.run_until_complete(task)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading") as thread:
        try:
            future = thread.submit(main)
            may_start.set()
            while not future.done():
                wait([future], timeout=0.5)  # not for ever: Ctrl-C just before it would not be seen
            return future.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was the task that failed
                loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            may_start.set()
