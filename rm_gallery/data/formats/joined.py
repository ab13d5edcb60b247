"""Joined rows: consecutive rows of one response each, with the same prompt, become one row with lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import MAX_RESPONSES
from rm_gallery.data.formats.prompts import find_prompt
from rm_gallery.data.sources import Chunk, Row

_CHUNK_ROWS = 512


@dataclass(frozen=True)
class JoinedChunk(Chunk):
    """Joined rows, each with the number of the first row that it is made of."""

    joined: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.joined)

    def skip(self, count: int) -> JoinedChunk:
        return JoinedChunk(self.file, self.joined[count].index, self.joined[count:])

    def rows(self) -> Iterator[Row]:
        return iter(self.joined)


def join_chunks(chunks: Iterable[Chunk], config: FormatConfig) -> Iterator[Chunk]:
    """The chunks of a file with joined rows, also across the ends of its chunks."""
    joined = join_rows((row for chunk in chunks for row in chunk.rows()), config)
    while rows := tuple(islice(joined, _CHUNK_ROWS)):
        yield JoinedChunk(rows[0].file, rows[0].index, rows)


def join_rows(rows: Iterable[Row], config: FormatConfig) -> Iterator[Row]:
    """A row for each run of rows with the same prompt: its responses and scores are lists, other columns the first's.

    A row that cannot be decoded, or has no prompt, stays alone.
    """
    keys: list[str | None] = [config.columns.response, config.columns.helpfulness]
    if config.attributes:
        keys += [*config.attributes, config.attributes_key, config.weight_key]
    names = [name for name in keys if name is not None]
    for _, run in groupby(rows, key=lambda row: _prompt_of(row, config)):
        while some := list(islice(run, MAX_RESPONSES + 1)):  # bounds memory; a group above the limit is dropped
            lists = {name: [row.values.get(name) for row in some] for name in names}
            yield some[0] if some[0].fault else replace(some[0], values=some[0].values | lists)


def _prompt_of(row: Row, config: FormatConfig) -> Any:
    name = None if row.fault else find_prompt(row.values, config)
    if name is None:
        return row.index
    return [row.values.get(key) for key in (name, config.columns.input, config.system_key, config.history_key) if key]
