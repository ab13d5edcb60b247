"""Rows of cases: from Python objects, or from parquet, JSON and JSON-lines files, each with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rm_gallery.errors import BadRow, UserError, one_line

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)
_BATCH_ROWS = 1024


class RawCase(NamedTuple):
    """One case as it was given."""

    where: str
    """`case 17`, or `file:row`; both count from 0."""
    values: Any
    """A mapping, if it is any good; BadRow for a row of a file that cannot be read."""


def find_files(cases: Any) -> list[Path] | None:
    """The files that `cases` names, or None when it holds the cases themselves.

    A folder gives its parquet, JSON and JSON-lines files, sorted by name. Raises UserError for a path that does not
    exist, a file of another kind, a folder without files, and a file that is named twice.
    """
    if isinstance(cases, str | os.PathLike):
        cases = [cases]
    if not isinstance(cases, Sequence) or not cases or not all(isinstance(item, str | os.PathLike) for item in cases):
        return None
    if not all(os.fspath(item) for item in cases):
        raise UserError("one of the inputs is an empty path; name a file or a folder")
    files = [file for item in cases for file in _expand(Path(item).expanduser())]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: the file is named twice; name it once")
        seen.add(file.resolve())
    return files


def _expand(path: Path) -> list[Path]:
    known = PARQUET + JSON_LINES + JSON
    try:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in known and not file.name.startswith("."))
            if not found:
                raise UserError(f"{path}: the folder holds no file of cases ({', '.join(known)})")
            return found
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder (working directory {Path.cwd()})")
    except OSError as error:
        raise UserError(f"{str(path)[:100]}: cannot be looked up ({error.strerror}); name another path") from error
    if path.suffix not in known:
        raise UserError(f"{path}: cases are read from {', '.join(known)}; write the file as one of these")
    return [path]


def iter_cases(cases: Any) -> Iterator[RawCase]:
    """The cases of a list, an iterator, or a DataFrame. Raises UserError for what is none."""
    if hasattr(cases, "to_dict") and hasattr(cases, "columns"):
        cases = cases.to_dict("records")
    if isinstance(cases, Mapping):
        raise UserError(
            "the cases are one dictionary: give a list of dictionaries, one per case (what a GradingRunner returned "
            "goes to results=..., beside the samples that were graded)"
        )
    if isinstance(cases, bytes) or not isinstance(cases, Iterable):
        raise UserError(f"the cases are of type {type(cases).__name__}: give a list of dictionaries, or paths of files")
    for index, values in enumerate(cases):
        yield RawCase(f"case {index}", values)


def read_files(files: Sequence[Path]) -> Iterator[RawCase]:
    """All rows of the files. Raises UserError, naming the file, for one that cannot be read."""
    for file in files:
        if file.suffix in PARQUET:
            rows = _read_parquet(file)
        elif file.suffix in JSON and _opens_list(file):
            rows = _read_list(file)
        else:
            rows = _read_lines(file)
        try:
            for index, values in enumerate(rows):
                yield RawCase(f"{file}:{index}", values)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _read_parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise UserError(f"{file}: column {double!r} stands there more than once; rename one of the two")
            for batch in parquet.iter_batches(_BATCH_ROWS):
                yield from _batch_rows(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet ({one_line(error)}); write it again") from error


def _batch_rows(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRow("a row that is not valid UTF-8")]
        return [row for place in range(len(batch)) for row in _batch_rows(batch.slice(place, 1))]


def _read_lines(file: Path) -> Iterator[Any]:
    """Values of the lines; empty lines are no rows and are not counted."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            text = line.strip().removeprefix(b"\xef\xbb\xbf") if number == 0 else line.strip()
            if text:
                yield _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        return BadRow("a row that is not valid UTF-8")
    except (ValueError, RecursionError):
        return BadRow("a row that is not valid JSON")


def _opens_list(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _read_list(file: Path) -> Iterator[Any]:
    rows = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(rows, BadRow):
        raise UserError(f"{file}: the file is not one list in valid JSON; write it again")
    yield from rows
