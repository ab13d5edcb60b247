"""The output of `rm-gallery score`: the rows of the input as they are, with the rewards of the parts beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.errors import UserError
from rm_gallery.scoring.rows import Table, open_parquet, parse_line, read_lines

_BATCH_ROWS = 1024
_GROUP_ROWS = 16_384  # rows of a row group in the output


class _Rewards:
    """The parts of one model, in order, taken as many rows at a time as wanted."""

    def __init__(self, parts: Sequence[Path], table: Table) -> None:
        self._tables = (pq.read_table(path, columns=list(table.gives)) for path in parts)
        self._rest: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        """The next `count` rows."""
        taken: list[pa.Table] = []
        while count:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._tables)
            part = self._rest.slice(0, count)
            self._rest = self._rest.slice(len(part))
            count -= len(part)
            taken.append(part)
        return pa.concat_tables(taken)


def write_output(table: Table, output: Path, parts: Sequence[Sequence[Path]], columns: Sequence[Sequence[str]]) -> None:
    """Write every row of the input with its rewards, with flat memory.

    parts: the parts of each model. columns: names that each model's rewards get.
    """
    rewards = [_Rewards(each, table) for each in parts]
    if table.is_parquet:
        _write_parquet(table, output, rewards, columns)
    else:
        _write_lines(table, output, rewards, columns)


def _write_parquet(table: Table, output: Path, rewards: Sequence[_Rewards], columns: Sequence[Sequence[str]]) -> None:
    with open_parquet(table.file) as parquet:
        schema = parquet.schema_arrow
        for names in columns:
            for name, column in zip(names, table.gives, strict=True):
                schema = schema.append(pa.field(name, pa.list_(pa.float32()) if column == "rewards" else pa.float32()))
        with pq.ParquetWriter(output, schema) as writer:
            waiting: list[pa.Table] = []
            for batch in parquet.iter_batches(_BATCH_ROWS):
                rows = pa.Table.from_batches([batch])
                for each, names in zip(rewards, columns, strict=True):
                    taken = each.take(len(batch))
                    for name, column in zip(names, table.gives, strict=True):
                        rows = rows.append_column(name, taken[column])
                waiting.append(rows.cast(schema))
                if sum(map(len, waiting)) >= _GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))


def _write_lines(table: Table, output: Path, rewards: Sequence[_Rewards], columns: Sequence[Sequence[str]]) -> None:
    names = [name for each in columns for name in each]
    rows = _reward_rows(table, rewards)
    with output.open("wb") as file:
        for number, (line, values) in enumerate(zip(read_lines(table.file), rows, strict=True)):
            parsed = parse_line(line)
            taken = [name for name in names if name in (parsed or {})]
            if taken:
                raise UserError(f"{table.file}:{number}: has a key {taken[0]!r} already; rename it")
            if parsed is None:
                text = line.decode("utf-8", errors="replace")
                line, parsed = json.dumps({"unreadable_line": text}).encode(), {"": ""}
            added = ", ".join(
                f"{json.dumps(name)}: {_number(value)}" for name, value in zip(names, values, strict=True)
            )
            # The object's own text stays as it is, with its numbers and escapes.
            file.write(line[:-1] + (b", " if parsed else b"") + added.encode() + b"}\n")


def _reward_rows(table: Table, rewards: Sequence[_Rewards]) -> Iterator[list[Any]]:
    """All rewards of each row, those of the first model first."""
    done = 0
    while done < table.num_rows:
        count = min(_BATCH_ROWS, table.num_rows - done)
        taken = [each.take(count) for each in rewards]
        listed = [part[column].to_pylist() for part in taken for column in table.gives]
        yield from map(list, zip(*listed, strict=True))
        done += count


def _number(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(map(_number, value)) + "]"
    return format(value, ".9g")  # all digits that a float32 has
