"""Files: all of an export, or none of it.

Rows are dictionaries for JSON lines, and Arrow tables for parquet, with one type per column.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.core.generator.pairs import Group, Pair, Row
from rm_gallery.core.generator.texts import Text
from rm_gallery.data.formats import as_messages
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import sync, temporary_path

_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 16_000_000


@dataclass(frozen=True)
class _TextColumn:
    """How the texts of a column are written."""

    kind: Literal["text", "messages"]
    role: str
    """Of a text that is written as a message, because another one of the column holds messages."""
    fields: tuple[str, ...] = ()
    """Of messages in parquet; empty when they are written as JSON there, because a field holds more than text."""

    @property
    def type(self) -> pa.DataType:
        if self.kind == "text" or not self.fields:
            return pa.string()
        return pa.list_(pa.struct([pa.field(name, pa.string()) for name in self.fields]))

    def plain(self, value: Text) -> Text:
        return value if self.kind == "text" else as_messages(value, self.role)

    def parquet(self, value: Text) -> Any:
        plain = self.plain(value)
        return plain if self.kind == "text" or self.fields else json.dumps(plain, ensure_ascii=False)


@dataclass(frozen=True)
class Columns:
    """The columns of all files of one export."""

    prompt: _TextColumn | None
    response: _TextColumn
    is_pairs: bool
    is_rank: bool
    """Of groups: written as `ranks`, not as `scores`."""
    has_source: bool

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Columns:
        """Columns that hold all these rows. Raises UserError for rows of which no file can hold both."""
        prompt = _text_column((row.prompt for row in rows if row.prompt), "user")
        response = _text_column((answer.text for row in rows for answer in row.answers), "assistant")
        ranked = {row.is_rank for row in rows if isinstance(row, Group)}
        if len(ranked) > 1:
            raise UserError(
                "some cases have scores and others only ranks, which no column can hold both; export them apart, "
                "or take layout='pairs'"
            )
        has_source = any(row.source is not None for row in rows)
        has_prompt = any(row.prompt for row in rows)
        return cls(prompt if has_prompt else None, response, isinstance(rows[0], Pair), ranked == {True}, has_source)

    def as_dict(self, row: Row) -> dict[str, Any]:
        """A row as JSON lines hold it: messages as lists, null for no prompt."""
        return self._row(row, _TextColumn.plain)

    def tables(self, rows: Iterable[Row]) -> Iterator[pa.Table]:
        """The rows as parquet holds them, some at a time."""
        batch: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            batch.append(self._row(row, _TextColumn.parquet))
            size += _length(row.prompt) + sum(_length(answer.text) for answer in row.answers)
            if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
                yield pa.Table.from_pylist(batch, schema=self.schema)
                batch, size = [], 0
        if batch:
            yield pa.Table.from_pylist(batch, schema=self.schema)

    @property
    def schema(self) -> pa.Schema:
        fields = [("prompt", self.prompt.type)] if self.prompt else []
        if self.is_pairs:
            fields += [("chosen", self.response.type), ("rejected", self.response.type), ("margin", pa.float64())]
        else:
            fields += [("responses", pa.list_(self.response.type))]
            fields += [("ranks" if self.is_rank else "scores", pa.list_(pa.float64()))]
        return pa.schema(fields + ([("source", pa.string())] if self.has_source else []))

    def _row(self, row: Row, write: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.prompt:
            values["prompt"] = write(self.prompt, row.prompt) if row.prompt else None
        if isinstance(row, Pair):
            values["chosen"] = write(self.response, row.chosen.text)
            values["rejected"] = write(self.response, row.rejected.text)
            values["margin"] = row.margin
        else:
            values["responses"] = [write(self.response, answer.text) for answer in row.answers]
            scores = [answer.score for answer in row.answers]
            values["ranks" if self.is_rank else "scores"] = [-score for score in scores] if self.is_rank else scores
        if self.has_source:
            values["source"] = row.source
        return values


def _text_column(values: Iterable[Text], role: str) -> _TextColumn:
    kind: Literal["text", "messages"] = "text"
    fields = {"role": None, "content": None}
    is_flat = True
    for value in values:
        if isinstance(value, str):
            continue
        kind = "messages"
        for message in value:
            fields.update(dict.fromkeys(message))
            is_flat = is_flat and all(isinstance(content, str) for content in message.values())
    return _TextColumn(kind, role, tuple(fields) if is_flat else ())


def _length(value: Text) -> int:
    return len(value) if isinstance(value, str) else sum(len(str(message.get("content") or "")) for message in value)


def plan_files(folder: Path, sides: Sequence[str], formats: Sequence[str], *, overwrite: bool) -> list[Path]:
    """The files of an export, side by side. Raises UserError where one is there already and may not be replaced."""
    files = [folder / f"{side}.{suffix}" for side in sides for suffix in formats]
    _check_folder(folder)
    for file in files:
        if not overwrite and os.path.lexists(file):
            raise UserError(f"{file}: is there already; set overwrite=True (--overwrite), or name another output_dir")
        if os.path.lexists(file) and not file.is_file():
            raise UserError(f"{file}: is no ordinary file; move it away, or name another output_dir")
    return files


def _check_folder(folder: Path) -> None:
    """Before hours of reading: whether there is, or can be, such a folder to write to."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(
            f"output_dir {str(folder)[:100]}: cannot be used ({error.strerror}); name another folder"
        ) from error
    if not nearest.is_dir():
        raise UserError(f"output_dir {folder}: {nearest} is no folder; name another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {nearest} may not be written to; name another folder")


def write_files(folder: Path, rows: Mapping[Path, Sequence[Row]], columns: Columns, *, overwrite: bool) -> None:
    """Write each file under a temporary name, and when all are whole give them theirs.

    rows: of each file; one without rows is not written, and removed if it is there. Raises UserError when a file
    cannot be written, or has appeared meanwhile and may not be replaced: then none is there, or the old ones still are.
    """
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in rows.items():
            if content:
                written[file] = temporary_path(file)
                _write(written[file], file.suffix, content, columns)
        _publish(rows, written, overwrite)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"output_dir {folder}: cannot be written ({reason}); make room or name another folder, and export again"
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _write(path: Path, suffix: str, rows: Sequence[Row], columns: Columns) -> None:
    with path.open("wb") as file:
        if suffix == ".parquet":
            with pq.ParquetWriter(file, columns.schema, compression="zstd") as writer:
                for table in columns.tables(rows):
                    writer.write_table(table)
        else:
            for row in rows:
                file.write(json.dumps(columns.as_dict(row), ensure_ascii=False).encode() + b"\n")
    sync(path)


def _publish(files: Mapping[Path, Any], written: Mapping[Path, Path], overwrite: bool) -> None:
    """Old files go before the first new one comes: files of two exports never stand together as if they were one.

    Their prompts would be split in two ways, so that one could be on both sides.
    """
    for file in files if overwrite else ():
        file.unlink(missing_ok=True)
    done: list[Path] = []
    try:
        for file, temporary in written.items():
            if os.path.lexists(file):
                raise UserError(f"{file}: another export has written it meanwhile; name another output_dir")
            os.replace(temporary, file)
            done.append(file)
    except BaseException:
        for file in done:
            file.unlink(missing_ok=True)
        raise
