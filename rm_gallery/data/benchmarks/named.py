"""Benchmarks as sets to validate on: what names one in `trainer.eval_sets`, and its rows as groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rm_gallery.data.benchmarks.published import (
    BENCHMARKS,
    Benchmark,
    SkippedRow,
    find_benchmark,
    looks_like_benchmark,
)
from rm_gallery.data.formats import READERS
from rm_gallery.data.sources import DataFile, FileEntry, Row, find_files, resolve_entries
from rm_gallery.data.sources.config import Files, as_entries
from rm_gallery.data.sources.local import exists_here
from rm_gallery.errors import BadRow, UserError, nearest
from rm_gallery.schema import Message, PreferenceGroup


@dataclass(frozen=True)
class NamedBenchmark:
    """A benchmark that a set of `trainer.eval_sets` names."""

    benchmark: Benchmark
    entry: FileEntry
    is_on_hub: bool
    """Whether the set names no files, so that the published ones are read."""

    def find(self, key: str) -> list[DataFile]:
        """The files, as of one entry. Raises UserError where there are none."""
        if self.is_on_hub:
            found = self.benchmark.find(None, key=key)
        elif exists_here(self.entry.path):
            found = self.benchmark.find(self.entry.path, key=key)
        else:  # a URL or another place on the hub
            found = resolve_entries([self.entry], key=key)
        return [replace(file, entry=0) for file in found]

    def check(self, key: str) -> None:
        """Raise UserError where `find` would without looking at URLs and the hub."""
        if self.is_on_hub:
            if not self.benchmark.hub:
                self.benchmark.find(None, key=key)
        elif exists_here(self.entry.path):
            self.benchmark.local_files(self.entry.path, key=key)
        else:
            find_files([self.entry], key=key)


def named_benchmark(name: str, files: Files) -> NamedBenchmark | None:
    """The benchmark of a set, by its value (`{a: rewardbench}`), its name (`{rewardbench: FOLDER}`) or a format.

    `{a: {path: FOLDER, format: rewardbench}}` has the format. None for other data; a format of `data.format` is not
    taken for the benchmark of that name.
    """
    entries = as_entries(files)
    if len(entries) != 1:
        return None
    [entry] = entries
    if entry.format is not None:
        found = find_benchmark(entry.format) if entry.format not in READERS else None
        return NamedBenchmark(found, entry, is_on_hub=False) if found else None
    if not exists_here(entry.path) and (found := find_benchmark(entry.path)):
        return NamedBenchmark(found, entry, is_on_hub=True)
    found = find_benchmark(name)
    return NamedBenchmark(found, entry, is_on_hub=False) if found else None


def check_set(name: str, files: Files, *, key: str) -> None:
    """Raise UserError for files of a set that do not exist, and for a name that is nearly that of a benchmark."""
    named = named_benchmark(name, files)
    if named is not None:
        return named.check(key)
    paths = [entry.path for entry in as_entries(files)]
    for text, what in ((name, key), *((path, f"{key}={path}") for path in paths if not exists_here(path))):
        if looks_like_benchmark(text):
            hint = nearest(text, BENCHMARKS) or f" Benchmarks are {', '.join(BENCHMARKS)}"
            other = " Or give the set another name" if text == name else ""
            raise UserError(f"{what}: no benchmark is called {text!r}.{hint}{other}")
    find_files(files, key=key)


ABOUT = "benchmark"
"""Key of a group's metadata: what a score needs besides the comparisons."""
NOT_SCORED = "not scored by the benchmark: "
"""Start of the reason for a row that the benchmark itself does not score."""


@dataclass(frozen=True)
class BenchmarkReader:
    """Reads the rows of a benchmark as groups to validate on, with their subset as source."""

    name: str
    separator: str | None = None
    """Text between turns for a model of raw text; None for one of chats."""

    def read(self, row: Row) -> PreferenceGroup:
        """Raises BadRow for a row that the benchmark does not score, and UserError as `Benchmark.item`."""
        try:
            item = BENCHMARKS[self.name].item(row)
        except SkippedRow as error:
            raise BadRow(f"{NOT_SCORED}{error}") from None
        about = {"quality": item.quality, "label": item.label, "comparisons": len(item.group.comparisons)}
        group = replace(item.group, source=item.subset, metadata={ABOUT: about})
        if self.separator is None:
            return group
        prompt, *responses = map(self._joined, (group.prompt, *group.responses))
        start = f"{prompt}{self.separator}" if group.prompt else ""
        return replace(group, prompt=start, responses=responses, style="text")

    def _joined(self, turns: str | Sequence[Message]) -> str:
        assert self.separator is not None
        return turns if isinstance(turns, str) else self.separator.join(message["content"] for message in turns)
