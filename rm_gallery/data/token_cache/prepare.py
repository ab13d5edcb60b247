"""Data preparation: the files of one side (training or validation) become token data, cached on disk.

The cache in `data.cache_dir` has a folder per fingerprint of the files, the tokenizer, its chat template, and every
setting that affects tokens. If several processes start together, one builds it and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from rm_gallery import __version__
from rm_gallery.data.benchmarks.named import BenchmarkReader
from rm_gallery.data.custom import CustomFacts, source_fingerprint
from rm_gallery.data.formats import WARNING, HoldOut, iter_tasks, source_of
from rm_gallery.data.sources import DataFile, FileEntry
from rm_gallery.data.token_cache.row_processor import (
    Processed,
    RowProcessor,
    RowsConfig,
    Work,
    process_in_order,
)
from rm_gallery.data.token_cache.store import DamagedStore, Facts, Store, StoreWriter, open_store
from rm_gallery.data.tokenization.tokenizer import closing_of
from rm_gallery.errors import Dropped, UserError
from rm_gallery.files import lock
from rm_gallery.schema import InputStyle

log = logging.getLogger(__name__)

_STORE_VERSION = 9  # increase it when the stored arrays, or how rows become tokens, change
_LOG_INTERVAL_S = 10.0
_CHECK_ROWS = 8  # rows per file that `peek` reads


@dataclass(frozen=True)
class PrepareConfig(RowsConfig):
    """Part of `data`: the token cache."""

    cache_dir: str | None = None
    """Folder of the token cache, with one folder per dataset and settings; may be deleted at any time. Default:
    `$RM_GALLERY_CACHE`, or `~/.cache/rm_gallery`."""
    num_workers: Annotated[int, Ge(0)] | None = None
    """Worker processes for tokenization; default: one per core, started after five seconds in the main process."""


def prepare(
    files: Sequence[DataFile],
    entries: Sequence[FileEntry],
    config: PrepareConfig,
    tokenizer: Any,
    *,
    key: str,
    share: HoldOut | None = None,
    benchmark: BenchmarkReader | None = None,
) -> Store:
    """Token data of all usable rows of the files, in order, with the counts of dropped rows.

    entries: indexed by `DataFile.entry`. key: configuration key of the files, for messages.
    share: the wanted side of the hold-out by prompt; None uses every row. benchmark: reads the rows, if they are one.
    Raises UserError for files that cannot be read or mix chats with raw texts, and if the cache cannot be written.
    """
    folder = cache_folder(config.cache_dir) / _fingerprint(files, entries, config, tokenizer, share, benchmark)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        store = _open(folder, key, logging.WARNING)
        if store is not None:
            log.info("%s: tokens from the cache (%s)", key, folder)
            for warning in (each for each in store.facts.formats if each.startswith(WARNING)):
                log.warning("%s", warning.removeprefix(WARNING))
            return store
        with _locked(folder, key):
            store = _open(folder, key, logging.DEBUG)  # another process may have built it in the meantime
            return store or _build(folder, files, entries, Work(config, tokenizer, share, benchmark), config, key)
    except OSError as error:  # errors of reading the data are UserErrors
        raise UserError(
            f"{folder.parent}: the cache of tokenized data cannot be used ({error.strerror or error}); "
            "set data.cache_dir to a folder with free space"
        ) from error


def peek(
    files: Sequence[DataFile], entries: Sequence[FileEntry], config: PrepareConfig, tokenizer: Any, *, key: str,
    benchmark: BenchmarkReader | None = None,
) -> CustomFacts:  # fmt: skip
    """Read the first rows of each file as training would; raises UserError as `prepare` does."""
    work, chosen, custom = Work(config, tokenizer, benchmark=benchmark), set[str](), CustomFacts()
    processor = RowProcessor(work)
    for file in files:
        for task in islice(iter_tasks([file], entries, config, key, chosen, detect=benchmark is None), 1):
            rows = islice(task.chunk.rows(), _CHECK_ROWS)
            custom.add(processor.process(rows, processor.readers.get(task.format_name), task.source).custom)
    return custom


def cache_folder(cache_dir: str | None) -> Path:
    """The folder `data.cache_dir`, or the default: $RM_GALLERY_CACHE, else ~/.cache/rm_gallery."""
    return Path(cache_dir or os.environ.get("RM_GALLERY_CACHE") or "~/.cache/rm_gallery").expanduser()


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """One process at a time on this machine; the lock of a process that dies is released."""

    def on_wait(holder: str) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # A worker of the process that holds the lock would wait forever.
            raise UserError(
                "a script that starts training without `if __name__ == '__main__':` starts it again in each process "
                "that tokenizes; add that line, or set data.num_workers=0"
            )
        log.info("%s: waiting for %s, which tokenizes the same data", key, holder)

    with lock(folder.with_name(f"{folder.name}.lock"), on_wait=on_wait):
        yield


def _fingerprint(
    files: Sequence[DataFile],
    entries: Sequence[FileEntry],
    config: PrepareConfig,
    tokenizer: Any,
    share: HoldOut | None,
    benchmark: BenchmarkReader | None,
) -> str:
    """Hash of everything that affects the token data of these files."""
    names = {each.name for each in fields(RowsConfig)}
    facts = {
        "store": _STORE_VERSION,
        "versions": [__version__, *(metadata.version(name) for name in ("tokenizers", "transformers", "jinja2"))],
        "files": [(file.path, file.name, file.kind, file.entry, file.identity, file.max_row_bytes) for file in files],
        "entries": [(entry.format, source_of(entry, entries)) for entry in entries],
        "config": {name: value for name, value in asdict(config).items() if name in names},
        "custom class": source_fingerprint(config.custom_cls) if config.custom_cls.path else None,
        "share": share,
        **({"benchmark": asdict(benchmark)} if benchmark else {}),
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "template": tokenizer.chat_template,
        "closing": closing_of(tokenizer),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _open(folder: Path, key: str, level: int) -> Store | None:
    """The store in the cache; None if there is none, or a damaged one, which is logged."""
    try:
        return open_store(folder)
    except DamagedStore as damage:
        log.log(level, "%s: the token cache %s is damaged (%s); tokenizing the data again", key, folder, damage)
        return None


def _build(
    folder: Path, files: Sequence[DataFile], entries: Sequence[FileEntry], work: Work, config: PrepareConfig, key: str
) -> Store:
    chosen: set[str] = set()
    totals = _Totals(key)
    with StoreWriter(folder) as writer:
        tasks = iter_tasks(files, entries, config, key, chosen, detect=work.benchmark is None)
        if work.benchmark is not None:
            chosen.add(f"benchmark {work.benchmark.name}")
        for processed in process_in_order(tasks, work, num_workers=config.num_workers):
            totals.add(processed)
            writer.append(processed.chunk)
        writer.finish(totals.facts(sorted(chosen)), totals.dropped, totals.custom)
    try:
        store = open_store(folder)
    except DamagedStore as damage:
        raise UserError(f"{folder}: the cache that was just written is damaged ({damage}); check the disk") from damage
    if store is None:
        raise UserError(f"{folder}: the cache that was just written was deleted; run again")
    return store


class _Totals:
    """Counts of all rows so far; logs progress periodically."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.dropped = Dropped()
        self._styles: dict[InputStyle, str] = {}
        self._has_text_prompts = False
        self.custom = CustomFacts()
        self._num_rows = self._held_out = 0
        self._start = self._logged = time.monotonic()

    def add(self, processed: Processed) -> None:
        self.dropped.merge(processed.dropped)
        for style, where in processed.styles.items():
            self._styles.setdefault(style, where)
        if len(self._styles) > 1:
            raise UserError(
                f"the data mix chat messages ({self._styles['chat']}) with raw texts ({self._styles['text']}); "
                "set data.input_style=chat to read all as chats, or split the files"
            )
        self._has_text_prompts |= processed.has_text_prompts
        self.custom.add(processed.custom)
        self._num_rows += processed.num_rows
        self._held_out += processed.held_out
        now = time.monotonic()
        if now - self._logged > _LOG_INTERVAL_S:
            self._logged = now
            rate = self._num_rows / (now - self._start)
            log.info("%s: %d rows tokenized (%.0f rows/s)", self._key, self._num_rows, rate)

    def facts(self, formats: list[str]) -> Facts:
        return Facts(
            style=next(iter(self._styles), "text"),
            has_text_prompts=self._has_text_prompts,
            formats=formats,
            num_rows=self._num_rows,
            held_out=self._held_out,
        )
