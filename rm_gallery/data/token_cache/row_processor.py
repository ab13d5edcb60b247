"""Processing rows: chunks of a file become token arrays, in order, by this process alone or by several workers.

Everything between a file's rows and the token store happens here, for one chunk at a time and with bounded memory:
format or custom class, hold-out by prompt, template and tokenizer, length policy, common prefix.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, Literal, Protocol, TypeAlias

from rm_gallery.data.custom import CustomFacts, CustomReader
from rm_gallery.data.formats import FormatConfig, RowReader, prompt_key
from rm_gallery.data.sources import Chunk, Row
from rm_gallery.data.token_cache.arrays import TokenChunk, make_chunk
from rm_gallery.data.tokenization.encoder import Encoder, GroupEncoder
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, hash_prompt, split_prefix
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.schema import InputStyle, PreferenceGroup

_GROUPS_AT_ONCE = 512  # tokenized in one call

Share: TypeAlias = tuple[Literal["train", "val"], float]
"""Which side of the hold-out is wanted, and the fraction of the prompts that is held out for validation."""


class Reader(Protocol):
    """A row as a group; raises BadRow with the reason why there is none."""

    def read(self, row: Row) -> PreferenceGroup: ...


@dataclass(frozen=True)
class RowsConfig(FormatConfig, TokenizeConfig):
    """Part of `data`: all that decides what a row becomes."""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know; the same for every chunk."""

    config: RowsConfig
    tokenizer: Any
    """None only with an encoder that needs none."""
    share: Share | None = None


Observe: TypeAlias = Callable[[PreferenceGroup, TokenGroup, int], None]
"""`observe(group, tokens, prompt hash)`: called for each group that becomes tokens, in order."""


@dataclass
class Processed:
    """What became of a chunk."""

    chunk: TokenChunk
    dropped: Dropped = field(default_factory=Dropped)
    styles: dict[InputStyle, str] = field(default_factory=dict)
    """Each style that occurs, with `file:row` of the first group that has it."""
    has_text_prompts: bool = False
    num_rows: int = 0
    held_out: int = 0
    custom: CustomFacts = field(default_factory=CustomFacts)


class RowProcessor:
    """Turns chunks into token arrays; one of them for each process."""

    def __init__(
        self, work: Work, *, encoder_type: Callable[..., GroupEncoder] = Encoder, observe: Observe | None = None
    ) -> None:
        """encoder_type: for other units than tokens, as words; takes the arguments of `Encoder`."""
        self.work, self.config, self._observe = work, work.config, observe
        self._readers: dict[str, Reader] = {}
        self._custom: CustomReader | None = None
        if self.config.custom_cls.path is not None:
            self._custom = CustomReader.from_config(self.config, work.tokenizer)
        render = None if self._custom is None else self._custom.render
        self.encoder = encoder_type(work.tokenizer, self.config, render=render)

    def reader(self, format_name: str) -> Reader:
        """The custom class, or the reader of a format."""
        if self._custom is not None:
            return self._custom
        if format_name not in self._readers:
            has_template = self.work.tokenizer is None or self.work.tokenizer.chat_template is not None
            self._readers[format_name] = RowReader(self.config, format_name, has_chat_template=has_template)
        return self._readers[format_name]

    def process(self, rows: Iterable[Row], reader: Reader, source: str) -> Processed:
        """Token arrays of the usable rows, in order; the others are counted.

        source: name of the data set for rows that name none.
        Raises UserError at the first bad row under `bad_rows=error`, for a text that is too long under
        `truncation=error`, and for a custom class that fails.
        """
        result = Processed(TokenChunk({}, [], []))
        groups = self._read(rows, reader, result)
        result.chunk = make_chunk(self._tokenize(groups, source, result))
        if self._custom is not None:
            result.custom = self._custom.take_facts()
        return result

    def _read(
        self, rows: Iterable[Row], reader: Reader, result: Processed
    ) -> Iterator[tuple[Row, PreferenceGroup, int]]:
        for row in rows:
            result.num_rows += 1
            try:
                group = reader.read(row)
                prompt = hash_prompt(prompt_key(group))
            except BadRow as error:
                self._drop(error, row.where, result)
                continue
            if self.work.share is None or is_wanted(prompt, self.work.share):
                yield row, group, prompt
            else:
                result.held_out += 1

    def _tokenize(
        self, groups: Iterator[tuple[Row, PreferenceGroup, int]], source: str, result: Processed
    ) -> Iterator[tuple[TokenGroup, Origin]]:
        while some := list(islice(groups, _GROUPS_AT_ONCE)):
            encoded = self.encoder.encode_many([group for _, group, _ in some])
            for (row, group, prompt), texts in zip(some, encoded, strict=True):
                try:
                    if isinstance(texts, BadRow):
                        raise texts
                    tokens = split_prefix(*self.encoder.fit(texts, group))
                except BadRow as error:
                    self._drop(error, row.where, result)
                    continue
                result.styles.setdefault(group.style, row.where)
                result.has_text_prompts |= group.style == "text" and bool(group.prompt)
                if self._observe is not None:
                    self._observe(group, tokens, prompt)
                yield tokens, Origin(row.file, row.index, group.source or source, prompt, group.metadata)

    def _drop(self, error: BadRow, where: str, result: Processed) -> None:
        if self.config.bad_rows == "error":
            raise UserError(f"{where}: {error}; mend the row, or set data.bad_rows=drop to leave it out") from None
        result.dropped.add(str(error), where)


def is_wanted(prompt_hash: int, share: Share) -> bool:
    """Whether a prompt belongs to this side: the same prompts are held out whatever the order and size of the data."""
    side, fraction = share
    return (prompt_hash / 2**64 < fraction) == (side == "val")


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
