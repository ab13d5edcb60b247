"""Workers: chunks are processed in order, by this process alone or by several, with bounded memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context

from rm_gallery.data.process_rows import Processed, RowProcessor, Work
from rm_gallery.data.source import Chunk
from rm_gallery.errors import UserError

# Starting workers takes seconds, in which each loads its libraries: they come when there is more to do than that.
_SECONDS_ALONE = 5.0
_MOST_WORKERS = 32

_processor: RowProcessor | None = None  # of a worker process


@dataclass(frozen=True)
class Task:
    """A chunk, how its file is read, and the name of its data set for rows that name none."""

    chunk: Chunk
    format_name: str
    source: str


def process_in_order(tasks: Iterable[Task], work: Work, *, num_workers: int | None = None) -> Iterator[Processed]:
    """What became of each chunk, in order.

    num_workers: processes beside this one, which begins alone; 0 for none, None for one per core that this process may
    use. At most two chunks per worker are under way, so memory does not grow with the data.
    Raises UserError as `RowProcessor.process` does, and when a worker dies.
    """
    tasks = iter(tasks)
    count = min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    stays_alone = not count or (count == 1 and num_workers is None)
    until = time.monotonic() + _SECONDS_ALONE
    processor = RowProcessor(work)
    while stays_alone or time.monotonic() < until:
        task = next(tasks, None)
        if task is None:
            return
        yield _process_with(processor, task)
    task = next(tasks, None)
    if task is not None:
        yield from _with_workers(chain([task], tasks), work, count)


def _with_workers(tasks: Iterator[Task], work: Work, count: int) -> Iterator[Processed]:
    # Fresh processes: a copy of one with torch's threads can hang.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(work,))
    running: deque[Future[Processed]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(_process, task))
            if len(running) >= 2 * count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes died (out of memory, or a script that starts training without "
            "`if __name__ == '__main__':`); set data.num_workers=0 to tokenize in the main process"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(work: Work) -> None:
    global _processor
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _processor = RowProcessor(work)


def _end_with_parent(parent: int) -> None:
    """A killed main process takes its workers along; nothing else would tell them."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _process(task: Task) -> Processed:
    assert _processor is not None
    return _process_with(_processor, task)


def _process_with(processor: RowProcessor, task: Task) -> Processed:
    return processor.process(task.chunk.rows(), processor.reader(task.format_name), task.source)
