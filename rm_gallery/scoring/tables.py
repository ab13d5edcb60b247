"""Tables to score: parquet and JSON lines, what their columns hold, a row as a group, and the output.

The output is the rows of the input as they are, with the rewards of the parts beside them. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.data.formats import read_cell
from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.inputs import InputBuilder

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson", ".json")
_BATCH_ROWS = 1024

# What a file may hold, the first that fits: (columns that it needs, columns of rewards that it gets).
_SHAPES = (
    (("chosen", "rejected"), ("reward_chosen", "reward_rejected")),
    (("messages",), ("reward",)),
    (("responses",), ("rewards",)),
    (("response",), ("reward",)),
)


@dataclass(frozen=True)
class Table:
    """One input file."""

    file: Path
    num_rows: int
    needs: tuple[str, ...]
    """Columns that rewards are made of; `prompt` is read too where there is one."""
    gives: tuple[str, ...]
    """Columns of rewards: `rewards` holds a list, the others a number."""
    columns: tuple[str, ...]
    """All columns of the file; of JSON lines those of the first object."""

    @property
    def is_parquet(self) -> bool:
        return self.file.suffix in PARQUET


def find_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """Input files in order; a folder gives its parquet and JSON-lines files, sorted by name.

    Raises UserError for a path that does not exist, a folder without such files and a file of another kind.
    """
    known = PARQUET + JSON_LINES
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in known and not file.name.startswith("."))
            if not found:
                raise UserError(f"{name}: the folder holds no file to score ({', '.join(known)})")
            files += found
        elif not path.is_file():
            raise UserError(f"{name}: no such file or folder (working directory {Path.cwd()})")
        elif path.suffix not in known:
            raise UserError(
                f"{name}: only parquet and JSON lines are read; name a file that ends in {', '.join(known)}"
            )
        else:
            files.append(path)
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: the file is named twice; name it once")
    return files


def open_table(path: Path) -> Table:
    """Count the rows of a file and look at its columns.

    Raises UserError for a file that cannot be read or has no columns that can be scored.
    """
    if path.suffix in PARQUET:
        with open_parquet(path) as parquet:
            names, num_rows = parquet.schema_arrow.names, parquet.metadata.num_rows
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise UserError(f"{path}: column {double!r} stands there more than once; rename one of the two")
    else:
        names, num_rows = _look_into_lines(path)
    if not num_rows:
        raise UserError(f"{path}: the file holds no rows; leave it out")
    for needs, gives in _SHAPES:
        if all(name in names for name in needs):
            return Table(path, num_rows, needs, gives, tuple(names))
    raise UserError(
        f"{path}: no columns that can be scored (columns: {', '.join(names) or 'none'}); it needs chosen and rejected, "
        "or messages, or response or responses, perhaps with prompt"
    )


def open_parquet(path: Path) -> Any:
    """The file, open; raises UserError when it cannot be read as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({one_line(error)}); write it again") from error


def _look_into_lines(path: Path) -> tuple[list[str], int]:
    names: list[str] | None = None
    count = 0
    for line in read_lines(path):
        count += 1
        if names is None:
            values = parse_line(line)
            names = list(values) if values is not None else None
    if count and names is None:
        raise UserError(f"{path}: no line is a JSON object; write one object a line")
    return names or [], count


def read_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Lines from number `start` on, without their ends; empty lines are no rows and are not counted."""
    with path.open("rb") as file:
        lines = (line.strip().removeprefix(b"\xef\xbb\xbf") for line in file)
        yield from islice((line for line in lines if line), start, None)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None for anything else."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_values(table: Table, start: int) -> Iterator[Mapping[str, Any] | None]:
    """What rewards are made of, of each row from `start` on, with flat memory; None for a line that cannot be read."""
    if not table.is_parquet:
        yield from map(parse_line, read_lines(table.file, start))
        return
    wanted = [name for name in (*table.needs, "prompt") if name in table.columns]
    with open_parquet(table.file) as parquet:
        first = 0  # row groups that lie before `start` as a whole are not read
        while first < parquet.num_row_groups and start >= parquet.metadata.row_group(first).num_rows:
            start -= parquet.metadata.row_group(first).num_rows
            first += 1
        groups = list(range(first, parquet.num_row_groups))
        for batch in parquet.iter_batches(_BATCH_ROWS, groups, wanted):
            rows = batch.slice(min(start, len(batch)))
            start = max(0, start - len(batch))
            for place in range(len(rows)):
                try:
                    yield {name: column[place].as_py() for name, column in zip(wanted, rows.columns, strict=True)}
                except UnicodeDecodeError:
                    yield None


def read_group(values: Mapping[str, Any] | None, table: Table, inputs: InputBuilder) -> PreferenceGroup:
    """One row as the model was trained to read it; raises BadRow with the reason why it cannot be."""
    if values is None:
        raise BadRow("row that cannot be read (no JSON object, or not UTF-8)")
    prompt = read_cell(_known(values.get("prompt") or "", "prompt"), "prompt", required=False)
    try:
        if table.needs == ("chosen", "rejected"):
            pair = {name: _cell(values, name) for name in table.needs}
            return inputs.pair({"prompt": prompt, **pair})
        if table.needs == ("messages",):
            messages = _cell(values, "messages")
            if isinstance(messages, str):
                raise BadRow("messages that are text" if messages else "empty messages")
            return inputs.conversation(messages)
        if table.needs == ("response",):
            return inputs.group(prompt, [_cell(values, "response")])
        responses = values.get("responses")
        if not isinstance(responses, list):
            raise BadRow("null responses" if responses is None else "responses that are no list")
        return inputs.group(prompt, [_cell({"responses": value}, "responses") for value in responses])
    except UserError as error:
        raise BadRow(str(error)) from error


def _cell(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    if value is None:
        raise BadRow(f"null {name}")
    return read_cell(_known(value, name), name, required=False)


def _known(value: Any, name: str) -> Any:
    if not isinstance(value, str | list):
        raise BadRow(f"{name} that is {type(value).__name__}, not text or messages")
    return value


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
