"""Input tables of `rm-gallery score`: rows as groups to score, and the output with rewards next to the input's columns.

Rows are read by data/sources and data/formats, as in training. Needs no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge

from rm_gallery.data.formats import SAMPLE_ROWS, FormatConfig, ResponsesConfig, RowReader, choose_format, has_labels
from rm_gallery.data.sources import Chunk, DataFile, Row, count_rows, read_chunks, read_rows
from rm_gallery.data.sources.records import MAX_ROW_BYTES, suffixes, without_query
from rm_gallery.data.sources.tables import ArrowChunk
from rm_gallery.data.sources.text_files import CellChunk, LineChunk
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import InputStyle, PreferenceGroup
from rm_gallery.scoring.inputs import InputBuilder
from rm_gallery.scoring.parts import Parts, changed, check_rows

log = logging.getLogger(__name__)

KEY = "INPUT"
"""Name of the inputs in messages, as in the usage line."""
PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson", ".json")
BEST_COLUMNS = ("best_index", "best_response")
"""With `--best`: index (from 0) and text of the response with the highest reward, the first of several."""
_TYPES = {"rewards": pa.list_(pa.float32()), "best_index": pa.int32(), "best_response": pa.string()}
# Training compares what these formats hold; scoring reads each response of them.
_SCORED_AS = {"scored": "responses", "ranked": "responses", "helpsteer2": "response"}
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
    label_format: str = ""
    """Format of training that says which response is better; '' for none."""
    attributes: tuple[str, ...] = ()
    """Names of the models' outputs; () for models of one reward."""
    best: bool = False
    """Whether the output names the best response of each row (`--best`)."""

    @property
    def label_config(self) -> FormatConfig:
        """How training would read the rows."""
        return FormatConfig(**{each.name: getattr(self.config, each.name) for each in fields(FormatConfig)})

    @property
    def added_columns(self) -> tuple[str, ...]:
        """Columns of a model in the output."""
        return self.added_columns_of(self.reward_columns)

    def added_columns_of(self, reward_columns: tuple[str, ...]) -> tuple[str, ...]:
        """Columns of a model with these columns of rewards in the output."""
        return (*reward_columns, *BEST_COLUMNS) if self.best else reward_columns

    @property
    def reward_columns(self) -> tuple[str, ...]:
        """Columns of rewards, then of each attribute, as `reward_helpfulness`."""
        return (*self.base_columns, *(f"{base}_{name}" for name in self.attributes for base in self.base_columns))

    @property
    def base_columns(self) -> tuple[str, ...]:
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
        """See `reader_for`."""
        return reader_for(self.config, self.format_name, style)

    def rows(self) -> Iterator[Row]:
        """All rows, with constant memory."""
        return read_rows([self.file], key=KEY)

    def chunks(self) -> Iterator[Chunk]:
        """All rows, undecoded."""
        return read_chunks(self.file, key=KEY)


def reader_for(config: FormatConfig, format_name: str, style: InputStyle) -> RowReader:
    """Reads rows as a model of this style was trained to read them.

    A text model gets pairs of raw texts as they are; other layouts become chats, whose turns `InputBuilder.fit` joins.
    """
    if config.input_style == "auto" and (style == "chat" or format_name not in _PAIRS):
        config = replace(config, input_style="chat")
    return RowReader(config, format_name, has_chat_template=style == "chat")


def open_table(
    file: DataFile, config: ScoreDataConfig, said: set[str] | None = None, *, best: bool = False
) -> InputTable:
    """Detect the layout of a file and count its rows.

    said: choices of a layout already logged (see `choose_format`). best: see `InputTable`.
    Raises UserError for a file that cannot be read, is empty, or has no columns that can be scored, and with `best`
    for rows that are not lists of responses.
    """
    head = list(islice(read_rows([file], key=KEY), SAMPLE_ROWS))
    name = _SCORED_AS.get(config.format, config.format)
    choice = choose_format(head, replace(config, format=name), logged=said)  # type: ignore[arg-type]  # a known name
    columns = dict.fromkeys(name for row in head for name in row.values)
    table = InputTable(file, config, choice.name, 0, tuple(columns), best=best)
    if best and table.base_columns != ("rewards",):
        what = "pairs" if choice.name in _PAIRS else "one response per row"
        raise UserError(
            f"{file.name}: --best chooses from a list of responses, but this file has {what}; remove --best"
        )
    return replace(table, num_rows=count_rows(file, key=KEY), label_format=_find_labels(head, table))


def _find_labels(head: Sequence[Row], table: InputTable) -> str:
    """The format of the labels; '' for none, with a warning if there are some that cannot be used."""
    config, name = table.label_config, table.file.name
    if config.format == "auto" and not has_labels(head, config):
        return ""
    try:
        found = choose_format(head, config, quiet=True).name
    except UserError as error:
        log.warning("%s: accuracy is not computed: %s", name, str(error).removeprefix(f"{name}: "))
        return ""
    if _SCORED_AS.get(found, found) != table.format_name:
        log.warning(
            "%s: accuracy is not computed: rows are scored as %s, but their labels are of data.format=%s; set "
            "data.format=%s to score these responses",
            name, table.format_name, found, found,
        )  # fmt: skip
        return ""
    return found


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


def with_rewards(table: InputTable, parts: Sequence[Parts]) -> Iterator[tuple[Chunk, list[pa.Table]]]:
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
    given = input_schema(table)
    schema = given
    for names, each in zip(columns, parts, strict=True):
        for name, column in zip(names, table.added_columns_of(each.columns), strict=True):
            schema = schema.append(
                pa.field(
                    name, _TYPES.get(column.split("_")[0] if column.startswith("rewards_") else column, pa.float32())
                )
            )
    with pq.ParquetWriter(output, schema) as writer:
        waiting: list[pa.Table] = []
        for chunk, rewards in with_rewards(table, parts):
            rows = _as_table(chunk, given)
            for taken, names, each in zip(rewards, columns, parts, strict=True):
                for name, values in zip(names, _added_values(table, chunk, taken, each.columns), strict=True):
                    rows = rows.append_column(name, values)
            waiting.append(rows.cast(schema))
            if sum(map(len, waiting)) >= _ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _added_values(table: InputTable, chunk: Chunk, taken: pa.Table, columns: Sequence[str]) -> list[Any]:
    """The values of `added_columns` for the rows of a chunk, from their rewards by one model; columns: of its parts."""
    values: list[Any] = [taken[column] for column in columns]
    if table.best:
        reader = table.reader("chat")
        best = [
            _find_best(rewards, reader.read(row)) if rewards else (None, None)
            for row, rewards in zip(chunk.rows(), taken["rewards"].to_pylist(), strict=True)
        ]
        values += [pa.array([each[place] for each in best], _TYPES[name]) for place, name in enumerate(BEST_COLUMNS)]
    return values


def _find_best(rewards: Sequence[float], group: PreferenceGroup) -> tuple[int, str]:
    """Index and text of the response with the highest reward, the first of equal rewards and of equal responses.

    The rewards of equal responses differ in their last bits where they were computed in different packs. The text is
    the content of a single assistant turn, otherwise the messages as JSON.
    """
    turns = group.responses[rewards.index(max(rewards))]
    index = list(group.responses).index(turns)
    if isinstance(turns, str):
        return index, turns
    content = turns[0].get("content") if len(turns) == 1 and set(turns[0]) == {"role", "content"} else None
    is_answer = isinstance(content, str) and turns[0]["role"] == "assistant"
    return index, content if is_answer else json.dumps(turns, ensure_ascii=False)  # type: ignore[return-value]


def input_schema(table: InputTable) -> pa.Schema:
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
        for chunk, rewards in with_rewards(table, parts):
            listed = [
                values.to_pylist()
                for taken, each in zip(rewards, parts, strict=True)
                for values in _added_values(table, chunk, taken, each.columns)
            ]
            for line, *values in zip(_json_objects(chunk), *listed, strict=True):
                added = ", ".join(f"{name}: {json_value(value)}" for name, value in zip(names, values, strict=True))
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


def json_value(value: Any) -> str:
    """JSON text with all digits of a float32."""
    if value is None or isinstance(value, str | int):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(json_value, value)) + "]"
    return format(value, ".9g")
