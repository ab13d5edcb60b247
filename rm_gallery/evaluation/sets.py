"""Sets: what is evaluated on. Any data that training reads, or a benchmark by name, as a stream of `Item`s.

helpful.parquet              a file, folder, glob, URL or hub dataset in any format with preferences
mine=helpful.parquet         the same under another name
rewardbench                  a benchmark of the hub
rewardbench=FOLDER           a local copy of it
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from rm_gallery import config as configuration
from rm_gallery.data.benchmarks.published import (
    BENCHMARKS,
    KEY,
    Benchmark,
    SkippedRow,
    find_benchmark,
    looks_like_benchmark,
)
from rm_gallery.data.benchmarks.table import Item, quality_of
from rm_gallery.data.formats import FormatConfig, RowReader, hash_prompt, iter_tasks, prompt_key
from rm_gallery.data.sources import DataFile, FileEntry, read_rows, resolve_entries, save_rows
from rm_gallery.data.sources.local import exists_here
from rm_gallery.data.sources.records import MAX_ROW_BYTES, kind_of
from rm_gallery.data.sources.remote import is_url
from rm_gallery.errors import BadRow, Dropped, Problem, UserError, nearest
from rm_gallery.sampling import Reservoir
from rm_gallery.schema import InputStyle
from rm_gallery.scoring.tables import reader_for

log = logging.getLogger(__name__)

_SETTING = re.compile(r"\+*(data|model|objective|optim|trainer)(\.\w+)+=")
_NAMED = re.compile(r"(?P<name>[\w.@ -]+)=(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class EvaluateDataConfig(FormatConfig):
    """`data.KEY=VALUE` of `rm-gallery evaluate`: how rows are read."""

    split: str | None = None
    """Split of a folder or hub dataset with several; by default all of them."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset with several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; by default the newest."""
    max_row_bytes: Annotated[int, Ge(1)] = MAX_ROW_BYTES
    """A larger row is dropped and not read into memory."""


@dataclass(frozen=True)
class _Settings:
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)


def load_data_config(settings: Sequence[str]) -> EvaluateDataConfig:
    """How rows are read, from `data.KEY=VALUE` settings; raises UserError that lists all problems."""
    if not settings:
        return EvaluateDataConfig()  # without importing Hydra
    return configuration.load(_Settings, None, settings, check=_problems).data


def _problems(settings: _Settings) -> Iterator[Problem]:
    if settings.data.custom_cls.path or settings.data.custom_cls.name:
        yield Problem("data.custom_cls", "data.custom_cls: evaluate reads no custom class; write the rows as messages")


def is_setting(text: str) -> bool:
    """Whether an argument is a `data.KEY=VALUE` setting instead of a set."""
    return _SETTING.match(text) is not None


@dataclass
class Reading:
    """What one pass over a set found."""

    dropped: Dropped = field(default_factory=Dropped)
    num_usable: int = 0
    """Rows that can be used; more than were yielded if a sample was drawn."""


@dataclass(frozen=True)
class EvalSet:
    """A set, resolved to its files."""

    name: str
    source: str
    """As the user named it."""
    files: Sequence[DataFile]
    entries: Sequence[FileEntry]
    config: EvaluateDataConfig
    benchmark: Benchmark | None = None
    max_items: int | None = None
    """Size of the sample; None for all rows."""
    seed: int = 0

    def items(self, style: InputStyle, reading: Reading) -> Iterator[Item]:
        """The usable rows in order, read for a model of this style; the others are counted in `reading`.

        Raises UserError for a file in no format, for a bad row of a benchmark or under `data.bad_rows=error`, and if no
        row can be used.
        """
        found = self._all(style, reading)
        if self.max_items is None:
            yield from found
            return
        sample: Reservoir[Item] = Reservoir(self.max_items, seed=self.seed)
        for item in found:
            if (place := sample.wants()) is not None:
                sample.put(place, item)
        yield from sample.in_order()

    def _all(self, style: InputStyle, reading: Reading) -> Iterator[Item]:
        dropped = reading.dropped
        for item in self._read_benchmark(dropped) if self.benchmark else self._read(style, dropped):
            reading.num_usable += 1
            yield item
        if not reading.num_usable:
            raise UserError(
                f"{KEY}={self.source}: no row can be used: {dropped.describe() or 'it has no rows'}; fix the data, or "
                "set the columns with data.KEY=NAME"
            )

    def _read_benchmark(self, dropped: Dropped) -> Iterator[Item]:
        assert self.benchmark is not None
        for row in read_rows(self.files, key=KEY):
            try:
                yield self.benchmark.item(row)
            except SkippedRow as error:
                dropped.add(str(error), row.where)

    def _read(self, style: InputStyle, dropped: Dropped) -> Iterator[Item]:
        readers: dict[str, RowReader] = {}
        for task in iter_tasks(self.files, self.entries, self.config, KEY, set()):
            reader = readers.setdefault(task.format_name, reader_for(self.config, task.format_name, style))
            for row in task.chunk.rows():
                try:
                    group = reader.read(row)
                    prompt = hash_prompt(prompt_key(group))
                except BadRow as error:
                    if self.config.bad_rows == "error":
                        raise UserError(
                            f"{row.where}: {error}; fix the row, or set data.bad_rows=drop to drop it"
                        ) from None
                    dropped.add(str(error), row.where)
                    continue
                yield Item(group, prompt, group.source or task.source, quality_of(group))


def open_sets(
    sets: Any, config: EvaluateDataConfig, *, max_items: int | None = None, seed: int = 0, folder: Path | None = None
) -> list[EvalSet]:
    """The sets that arguments name, resolved to files.

    sets: a path or name, a list of these, rows in memory, or a mapping from names to any of these. folder: for rows in
    memory, which are written there. Raises UserError for a set that does not exist, a name that is taken twice, and for
    no set.
    """
    named = _named(sets, folder)
    if not named:
        raise UserError("no set to evaluate on; name a file with preferences, or a benchmark: " + ", ".join(BENCHMARKS))
    found = [_open(name, source, config, max_items, seed) for name, source in named]
    result = [replace(each, name=name) for each, name in zip(found, _unique(found), strict=True)]
    for number, each in enumerate(result):
        if folder is not None and Path(named[number][1]).parent == folder:  # rows in memory: their place is `NAME:row`
            files = [replace(file, name=each.name) for file in each.files]
            result[number] = replace(each, files=files, source=each.name)
    return result


def _named(sets: Any, folder: Path | None) -> list[tuple[str, str]]:
    """(name or '', path or benchmark) of each set."""
    if isinstance(sets, str | Path):
        return [_split(str(sets))]
    if isinstance(sets, Mapping):
        found = []
        for name, value in sets.items():
            [(_, source)] = [("", str(value))] if isinstance(value, str | Path) else [_saved(value, str(name), folder)]
            found.append((str(name), source))
        return found
    if isinstance(sets, list | tuple) and all(isinstance(each, str | Path) for each in sets):
        return [_split(str(each)) for each in sets]
    if isinstance(sets, list | tuple) and sets and not isinstance(sets[0], Mapping):
        return [pair for each in sets for pair in _named(each, folder)]
    return [_saved(sets, "rows", folder)]


def _saved(rows: Any, name: str, folder: Path | None) -> tuple[str, str]:
    assert folder is not None, "evaluate() has a folder for rows in memory"
    return name, str(save_rows(rows, folder, re.sub(r"\W+", "-", name) or "rows"))


def _split(text: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(text)
    if match is None or exists_here(text) or is_url(text):
        return "", text
    return match["name"], match["path"]


def _open(name: str, source: str, config: EvaluateDataConfig, max_items: int | None, seed: int) -> EvalSet:
    benchmark = find_benchmark(name) if name else find_benchmark(source)
    shown = f"{name}={source}" if name else source
    if benchmark is not None:
        path = source if name or exists_here(source) else None
        if path is not None and not name:
            log.info("%s: a local copy of %s", source, benchmark.title)
        files = benchmark.find(path)
        return EvalSet(benchmark.name, shown, files, (), config, benchmark, max_items, seed)
    hint = nearest(name or source, BENCHMARKS)
    if name and looks_like_benchmark(name):
        raise UserError(f"{KEY}={shown}: no benchmark is called {name!r}.{hint} Or give the set another name")
    is_path = exists_here(source) or is_url(source) or "/" in source or "*" in source or kind_of(source) is not None
    if not is_path:
        raise UserError(
            f"{KEY}={shown}: neither a file or folder (working directory {Path.cwd()}) nor a benchmark.{hint} "
            f"Benchmarks are {', '.join(BENCHMARKS)}"
        )
    entries = [FileEntry(source, split=config.split, subset=config.subset, revision=config.revision)]
    files = resolve_entries(entries, key=KEY, max_row_bytes=config.max_row_bytes)
    return EvalSet(name, shown, files, entries, config, None, max_items, seed)


def _unique(sets: Iterable[EvalSet]) -> list[str]:
    """A name for each set: given, or the last part of its path with as many parents as make it unique."""
    found = list(sets)
    given = [each.name for each in found if each.name]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two sets are called {twice!r}; give them names: NAME=PATH")
    paths = [Path(each.source) if not each.name else None for each in found]
    known = [path for path in paths if path is not None]
    depth, deepest = 1, max((len(path.parts) for path in known), default=1)
    while len({path.parts[-depth:] for path in known}) < len(known):
        if depth > deepest:
            raise UserError(f"{KEY}={known[0]} is named twice; name it once")
        depth += 1
    return [
        each.name if path is None else "/".join(path.parts[-depth:]) for each, path in zip(found, paths, strict=True)
    ]
