"""Rows to score: parquet and JSON lines, what each file's columns hold, and a row as a group. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rm_gallery.data.formats import read_cell
from rm_gallery.errors import BadRow, UserError
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
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); write it again") from error


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
