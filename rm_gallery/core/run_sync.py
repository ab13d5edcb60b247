"""run_sync: a coroutine as a blocking call, also where an event loop is running (a notebook)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine. In a running event loop it blocks that loop and runs in a thread with its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    task = loop.create_task(work)
    may_start = threading.Event()  # set once the pool has its thread: an earlier Ctrl-C would not wait for it

    def main() -> T:
        may_start.wait()
        with runner:
            return loop.run_until_complete(task)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="run_sync") as thread:
        try:
            future = thread.submit(main)
            may_start.set()
            while not future.done():
                wait([future], timeout=0.5)  # a wait without a timeout may miss a Ctrl-C
            return future.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the task itself failed
                loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            may_start.set()
