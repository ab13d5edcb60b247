"""Data in memory as files: a DataFrame, a dataset, an Arrow table or dicts, read like any other file from then on.

The name of a file holds a hash of its content, so the same data give the same file, and its tokens are cached.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

from rm_gallery.errors import UserError
from rm_gallery.files import remove, replace, sha256, temporary_path

InMemory: TypeAlias = Any
"""`pandas.DataFrame`, `datasets.Dataset`, `pyarrow.Table`, or an iterable of dicts, one per row."""

_DATASET_ROWS = 1000  # read at once


def save_rows(data: InMemory, folder: Path, name: str) -> Path:
    """Write rows to `folder/NAME-<hash>.parquet`, or to `.jsonl` for dicts, and return the path.

    name: of the argument that holds the data, for the file and for messages.
    Raises UserError for data that are none of `InMemory`, have no rows, or do not fit a file.
    """
    tables = _tables_of(data, name)
    suffix = ".jsonl" if tables is None else ".parquet"
    temporary = temporary_path(folder / f"{name}{suffix}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tables is None:
            _write_lines(data, temporary, name)
        else:
            _write_parquet(tables, temporary, name)
        path = folder / f"{name}-{sha256(temporary)[:16]}{suffix}"
        if not path.exists():  # a new file would have another time, and its tokens would not be found in the cache
            replace(temporary, path)
    except OSError as error:
        raise UserError(f"{name}: cannot be written to {folder} ({error}); set data.cache_dir") from error
    finally:
        remove(temporary)
    return path


def _tables_of(data: Any, name: str) -> Iterator[pa.Table] | None:
    """The data as Arrow tables, or None for rows that are dicts."""
    import pyarrow as pa

    kind = type(data)
    library = kind.__module__.partition(".")[0]
    if isinstance(data, pa.Table):
        return iter([data])
    if library == "pandas" and kind.__name__ == "DataFrame":
        try:
            return iter([pa.Table.from_pandas(data, preserve_index=False)])
        except pa.ArrowException as error:
            raise UserError(
                f"{name}: a column of the DataFrame has mixed types ({error}); pass a list of dicts"
            ) from None
    if library == "datasets" and kind.__name__ == "Dataset":
        return data.with_format("arrow").iter(batch_size=_DATASET_ROWS)
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, data))
        raise UserError(f"{name} is a {kind.__name__} with {splits or 'nothing'}; pass one dataset or a list of rows")
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise UserError(
            f"{name} is a {kind.__name__}; pass a path, a list of dicts, a pandas.DataFrame or a datasets.Dataset"
        )
    return None


def _write_parquet(tables: Iterable[pa.Table], path: Path, name: str) -> None:
    import pyarrow.parquet as pq

    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is None:
        raise UserError(f"{name} has no rows")
    writer.close()


def _write_lines(rows: Iterable[Any], path: Path, name: str) -> None:
    index = -1
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise UserError(f"{name}[{index}] is a {type(row).__name__}; each row must be a dict")
            try:
                file.write(json.dumps(dict(row), default=_plain) + "\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"{name}[{index}]: cannot be written as JSON ({error})") from None
    if index < 0:
        raise UserError(f"{name} has no rows")


def _plain(value: Any) -> Any:
    """NumPy arrays and scalars as plain values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value is a {type(value).__name__}")
