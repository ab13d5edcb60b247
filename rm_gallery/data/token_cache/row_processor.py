"""Row processing: chunks of rows become token arrays, in order, in this process or in a pool of worker processes.

For one chunk at a time, with bounded memory: format or custom class, hold-out by prompt, chat template and tokenizer,
length policy, common prefix.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeAlias

from rm_gallery.data.benchmarks.named import BenchmarkReader
from rm_gallery.data.custom import CustomFacts, CustomReader
from rm_gallery.data.formats import FormatConfig, HoldOut, Reader, Readers, RowCounts, Task, read_groups
from rm_gallery.data.sources import Row
from rm_gallery.data.token_cache.arrays import TokenChunk, make_chunk
from rm_gallery.data.tokenization.encoder import Encoder, GroupEncoder
from rm_gallery.data.tokenization.sandbox import limited_tokenizer
from rm_gallery.data.tokenization.token_group import Origin, Span, TokenGroup, split_prefix
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import InputStyle, PreferenceGroup

_GROUPS_PER_CALL = 512  # of the tokenizer


@dataclass(frozen=True)
class RowsConfig(FormatConfig, TokenizeConfig):
    """Part of `data`: everything that determines the tokens of a row."""


@dataclass(frozen=True)
class Work:
    """Arguments of a worker, the same for every chunk."""

    config: RowsConfig
    tokenizer: Any
    """None only with an encoder that does not need one."""
    share: HoldOut | None = None
    benchmark: BenchmarkReader | None = None
    """Reads every file, if it is one."""


Observe: TypeAlias = Callable[[PreferenceGroup, TokenGroup, int], None]
"""`observe(group, tokens, prompt hash)`: called for each tokenized group, in order."""


@dataclass
class Processed(RowCounts):
    """The token arrays of a chunk, and the counts of its rows."""

    chunk: TokenChunk = field(default_factory=lambda: TokenChunk({}, [], []))
    styles: dict[InputStyle, str] = field(default_factory=dict)
    """Each style that occurs, with `file:row` of the first group that has it."""
    has_text_prompts: bool = False
    custom: CustomFacts = field(default_factory=CustomFacts)


class RowProcessor:
    """Turns rows into token arrays; one instance per process."""

    def __init__(
        self, work: Work, *, encoder_type: Callable[..., GroupEncoder] = Encoder, observe: Observe | None = None
    ) -> None:
        """encoder_type: takes the arguments of `Encoder`; another type can count other units than tokens, as words."""
        self.work, self.config, self._observe = work, work.config, observe
        self._custom: CustomReader | None = None
        if self.config.custom_cls.path is not None:
            self._custom = CustomReader.from_config(self.config, limited_tokenizer(work.tokenizer))
        has_template = work.tokenizer is None or work.tokenizer.chat_template is not None
        self.readers = Readers(self.config, has_chat_template=has_template, custom=work.benchmark or self._custom)
        render = None if self._custom is None else self._custom.render
        self.encoder = encoder_type(work.tokenizer, self.config, render=render)

    def process(self, rows: Iterable[Row], reader: Reader, source: str) -> Processed:
        """Token arrays of the usable rows, in order; dropped rows are counted.

        source: name of the dataset for rows that name none.
        Raises UserError at the first bad row under `bad_rows=error`, for a text that is too long under
        `truncation=error`, and if the custom class fails.
        """
        result = Processed()
        groups = read_groups(rows, reader, result, bad_rows=self.config.bad_rows, hold_out=self.work.share)
        result.chunk = make_chunk(self._tokenize(groups, source, result))
        if self._custom is not None:
            result.custom = self._custom.take_facts()
        return result

    def _tokenize(
        self, groups: Iterator[tuple[Row, PreferenceGroup, int]], source: str, result: Processed
    ) -> Iterator[tuple[TokenGroup, Origin]]:
        while some := list(islice(groups, _GROUPS_PER_CALL)):
            encoded = self.encoder.encode_many([group for _, group, _ in some])
            for (row, group, prompt), texts in zip(some, encoded, strict=True):
                try:
                    if isinstance(texts, BadRow):
                        raise texts
                    spans = self._spans(texts, group)
                    fitted, comparisons = self.encoder.fit(texts, group)
                    spans = _inside(spans, texts, fitted, self.config)
                    tokens = split_prefix(fitted, comparisons, group.ratings, spans)
                except BadRow as error:
                    result.drop(error, row.where, self.config.bad_rows)
                    continue
                result.styles.setdefault(group.style, row.where)
                result.has_text_prompts |= group.style == "text" and bool(group.prompt)
                if self._observe is not None:
                    self._observe(group, tokens, prompt)
                yield tokens, Origin(row.file, row.index, group.source or source, prompt, group.metadata)

    def _spans(self, texts: list[list[int]], group: PreferenceGroup) -> list[Span]:
        """Target tokens of the language-model loss, before the length policy."""
        if self.config.lm_targets == "none":
            return []
        assert isinstance(self.encoder, Encoder), "targets are tokens"
        found = self.encoder.spans(texts, group)
        return [Span(place, max(1, first), last) for place, each in enumerate(found) for first, last in each]


def _inside(
    spans: Sequence[Span], texts: Sequence[list[int]], fitted: Sequence[list[int]], config: RowsConfig
) -> list[Span]:
    """The spans in the texts that the length policy left. Raises BadRow for a conversation without a target there.

    The EOS at the end of a truncated response is not what followed there, so it is no target.
    """
    found = []
    for span in spans:
        is_cut = len(fitted[span.response]) < len(texts[span.response])
        limit = len(fitted[span.response]) - (is_cut and config.lm_targets == "chosen")
        if span.first < min(span.last, limit):
            found.append(replace(span, last=min(span.last, limit)))
    if not found and config.lm_targets == "assistant":
        raise BadRow(
            f"no assistant token within data.max_length={config.max_length}" if spans else "no assistant token"
        )
    return found


# Workers take seconds to start, since each imports its libraries, so the main process works alone for this time first.
_SINGLE_PROCESS_S = 5.0
_MAX_WORKERS = 32

_processor: RowProcessor | None = None  # in a worker process


def process_in_order(tasks: Iterable[Task], work: Work, *, num_workers: int | None = None) -> Iterator[Processed]:
    """The result of each chunk, in order.

    num_workers: worker processes, started after `_SINGLE_PROCESS_S` seconds; 0 for none, None for one per available
    core. At most two chunks per worker are in flight, so memory does not grow with the data.
    Raises UserError as `RowProcessor.process`, and if a worker dies.
    """
    tasks = iter(tasks)
    count = min(_MAX_WORKERS, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    single_process = not count or (count == 1 and num_workers is None)
    until = time.monotonic() + _SINGLE_PROCESS_S
    processor = RowProcessor(work)
    while single_process or time.monotonic() < until:
        task = next(tasks, None)
        if task is None:
            return
        yield _process_with(processor, task)
    task = next(tasks, None)
    if task is not None:
        yield from _with_workers(chain([task], tasks), work, count)


def _with_workers(tasks: Iterator[Task], work: Work, count: int) -> Iterator[Processed]:
    # spawn, not fork: a forked process with torch's threads can hang.
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    _processor = RowProcessor(work)


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process dies, even if it is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _process(task: Task) -> Processed:
    assert _processor is not None
    return _process_with(_processor, task)


def _process_with(processor: RowProcessor, task: Task) -> Processed:
    return processor.process(task.chunk.rows(), processor.readers.get(task.format_name), task.source)
