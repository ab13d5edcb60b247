"""Input tables of `rm-gallery score`: rows as groups to score, and the output with rewards next to the input's columns.

Rows are read by data/sources and data/formats, as in training. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge

from rm_gallery.data.formats import SAMPLE_ROWS, ResponsesConfig, RowReader, choose_format
from rm_gallery.data.sources import Chunk, DataFile, Row, count_rows, read_chunks, read_rows
from rm_gallery.data.sources.records import MAX_ROW_BYTES, suffixes, without_query
from rm_gallery.data.sources.tables import ArrowChunk
from rm_gallery.data.sources.text_files import CellChunk, LineChunk
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import InputStyle, PreferenceGroup
from rm_gallery.scoring.inputs import InputBuilder
from rm_gallery.scoring.parts import Parts, changed, check_rows

KEY = "INPUT"
"""Name of the inputs in messages, as in the usage line."""
PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson", ".json")
_PAIRS = ("text", "messages", "json", "prompt")
_SINGLE = ("response", "conversation")
_ROW_GROUP_ROWS = 16_384  # of parquet output


@dataclass(frozen=True)
class ScoreDataConfig(ResponsesConfig):
    """`data.KEY=VALUE` of `rm-gallery score`: how rows are read. Labels, weights and sources are ignored."""

    split: str | None = None
    """Split of a folder or hub dataset with several; by default all of them."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset with several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; by default the newest."""
    max_row_bytes: Annotated[int, Ge(1)] = MAX_ROW_BYTES
    """A larger row gets no reward and is not read into memory."""


@dataclass(frozen=True)
class InputTable:
    """One file to score."""

    file: DataFile
    config: ScoreDataConfig
    format_name: str
    num_rows: int
    columns: tuple[str, ...]
    """Columns of the first rows."""

    @property
    def reward_columns(self) -> tuple[str, ...]:
        """Columns of rewards; `rewards` holds a list per row, the others one number."""
        if self.format_name in _PAIRS:
            return "reward_chosen", "reward_rejected"
        return ("reward",) if self.format_name in _SINGLE else ("rewards",)

    @property
    def output_name(self) -> str:
        """File name of the output in a folder: JSON lines for JSON, parquet for every other kind."""
        name = PurePosixPath(without_query(self.file.name.partition("::")[0])).name
        suffix, compression = suffixes(name)
        stem = name[: len(name) - len(suffix) - len(compression)]
        if self.file.kind == "jsonl":
            return stem + (suffix if suffix in (".jsonl", ".ndjson") else ".jsonl")
        return f"{stem}.parquet"

    def reader(self, style: InputStyle) -> RowReader:
        """Reads rows as a model of this style was trained to read them.

        A text model gets pairs of raw texts as they are; other layouts become chats, whose turns `InputBuilder.fit`
        joins.
        """
        config: Any = self.config
        if config.input_style == "auto" and (style == "chat" or self.format_name not in _PAIRS):
            config = ScoreDataConfig(**{**vars(config), "input_style": "chat"})
        return RowReader(config, self.format_name, has_chat_template=style == "chat")

    def rows(self) -> Iterator[Row]:
        """All rows, with constant memory."""
        return read_rows([self.file], key=KEY)

    def chunks(self) -> Iterator[Chunk]:
        """All rows, undecoded."""
        return read_chunks(self.file, key=KEY)


def open_table(file: DataFile, config: ScoreDataConfig, said: set[str] | None = None) -> InputTable:
    """Detect the layout of a file and count its rows.

    said: choices of a layout already logged (see `choose_format`).
    Raises UserError for a file that cannot be read, is empty, or has no columns that can be scored.
    """
    head = list(islice(read_rows([file], key=KEY), SAMPLE_ROWS))
    choice = choose_format(head, config, logged=said)
    columns = dict.fromkeys(name for row in head for name in row.values)
    return InputTable(file, config, choice.name, count_rows(file, key=KEY), tuple(columns))


def read_group(row: Row, reader: RowReader, inputs: InputBuilder) -> PreferenceGroup:
    """The group of a row in the style of the model; raises BadRow with the reason if it cannot be scored."""
    try:
        return inputs.fit(reader.read(row))
    except UserError as error:
        raise BadRow(str(error)) from error


class _Rewards:
    """The parts of one model in order, read in slices."""

    def __init__(self, parts: Parts) -> None:
        self._tables = parts.read()
        self._rest: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, or all that remain if there are fewer."""
        taken: list[pa.Table] = []
        while count:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._tables, None)
                if self._rest is None:
                    break
            part = self._rest.slice(0, count)
            self._rest = self._rest.slice(len(part))
            count -= len(part)
            taken.append(part)
        return pa.concat_tables(taken) if taken else pa.table({})

    def is_empty(self) -> bool:
        """Whether nothing remains."""
        return not len(self.take(1))


def write_output(
    table: InputTable, output: Path, parts: Sequence[Parts], columns: Sequence[Sequence[str]], *, parquet: bool
) -> None:
    """Write every row of the input with its rewards, with constant memory.

    parts: of each model. columns: names of each model's reward columns in the output.
    parquet: the output format; JSON lines otherwise. Raises UserError for JSON rows that no table can hold, and unless
    the rewards were computed from exactly the rows that the file has now.
    """
    if parquet:
        _write_parquet(table, output, parts, columns)
    else:
        _write_lines(table, output, parts, columns)


def _with_rewards(table: InputTable, parts: Sequence[Parts]) -> Iterator[tuple[Chunk, list[pa.Table]]]:
    """The chunks of the file, each with the rewards of its rows by model; UserError if one is of another row."""
    rewards, end = [_Rewards(each) for each in parts], 0
    for chunk in table.chunks():
        taken = [each.take(len(chunk)) for each in rewards]
        check_rows(taken, chunk.rows(), table.file.name, end)
        end += len(chunk)
        yield chunk, taken
    if end != table.num_rows or not all(each.is_empty() for each in rewards):
        raise changed(table.file.name, end)


def _write_parquet(table: InputTable, output: Path, parts: Sequence[Parts], columns: Sequence[Sequence[str]]) -> None:
    given = _input_schema(table)
    schema = given
    for names in columns:
        for name, column in zip(names, table.reward_columns, strict=True):
            schema = schema.append(pa.field(name, pa.list_(pa.float32()) if column == "rewards" else pa.float32()))
    with pq.ParquetWriter(output, schema) as writer:
        waiting: list[pa.Table] = []
        for chunk, rewards in _with_rewards(table, parts):
            rows = _as_table(chunk, given)
            for taken, names in zip(rewards, columns, strict=True):
                for name, column in zip(names, table.reward_columns, strict=True):
                    rows = rows.append_column(name, taken[column])
            waiting.append(rows.cast(schema))
            if sum(map(len, waiting)) >= _ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _input_schema(table: InputTable) -> pa.Schema:
    """The schema of the file; columns of CSV are text, those of JSON get the types that hold all rows."""
    schema = pa.schema([])
    for chunk in table.chunks():
        if isinstance(chunk, ArrowChunk):
            return chunk.batch.schema
        if isinstance(chunk, CellChunk):
            return pa.schema([(name, pa.string()) for name in chunk.names if name])
        rows = [row.values for row in chunk.rows()]
        for name in dict.fromkeys(name for values in rows for name in values):
            try:
                found = pa.schema([(name, pa.array([values.get(name) for values in rows]).type)])
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
            except (pa.ArrowException, OverflowError) as error:
                raise UserError(
                    f"{table.file.name}: column {name!r} has values that do not fit one parquet type "
                    f"({str(error).splitlines()[0]}); name an --output that ends in .jsonl"
                ) from error
    return schema


def _as_table(chunk: Chunk, schema: pa.Schema) -> pa.Table:
    """The rows of a chunk; a row that cannot be decoded is null in every column."""
    if isinstance(chunk, ArrowChunk):
        return pa.Table.from_batches([chunk.batch])
    return pa.Table.from_pylist([row.values for row in chunk.rows()], schema)


def _write_lines(table: InputTable, output: Path, parts: Sequence[Parts], columns: Sequence[Sequence[str]]) -> None:
    names = [json.dumps(name) for each in columns for name in each]
    with output.open("wb") as file:
        for chunk, rewards in _with_rewards(table, parts):
            listed = [taken[column].to_pylist() for taken in rewards for column in table.reward_columns]
            for line, *values in zip(_json_objects(chunk), *listed, strict=True):
                added = ", ".join(f"{name}: {_number(value)}" for name, value in zip(names, values, strict=True))
                opened = line[:-1].rstrip()
                file.write(opened + (b"" if opened == b"{" else b", ") + added.encode() + b"}\n")


def _json_objects(chunk: Chunk) -> Iterator[bytes]:
    """Each row as a JSON object on one line; the text of JSON rows, with its numbers and escapes, is copied."""
    if not isinstance(chunk, LineChunk):
        for row in chunk.rows():
            values = {"unreadable_row": row.fault} if row.fault else row.values
            yield json.dumps(values, ensure_ascii=False, default=str).encode()
        return
    for line in chunk.lines:
        try:
            is_object = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            is_object = False
        if is_object:
            yield b" ".join(line.splitlines())  # rows of a JSON list may span several lines
        else:
            yield json.dumps({"unreadable_line": line.decode("utf-8", errors="replace")}).encode()


def _number(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(map(_number, value)) + "]"
    return format(value, ".9g")  # all digits of a float32
