"""Sources: files as rows, each with the place it came from (`file:row`).

In: paths from the configuration. Out: `Row` records, one at a time, read in batches so that memory stays flat.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class SourceConfig:
    """Part of `data`: where the preference pairs lie."""

    __pydantic_config__ = {"extra": "forbid"}

    train_files: str | tuple[str, ...] = ""
    """Parquet file, folder of them, glob, or a list of these."""
    val_files: str | tuple[str, ...] = ""
    """The same for validation; empty for none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its columns by name, and where it stands."""

    values: dict[str, Any]
    file: str
    index: int
    """Number of the row in its file, from 0."""
    fault: str = ""
    """Why the row itself cannot be read (then `values` is empty); the same text for all rows with the same fault."""

    @property
    def where(self) -> str:
        """`file:row`, for messages."""
        return f"{self.file}:{self.index}"


def find_files(paths: str | Sequence[str], *, key: str) -> list[Path]:
    """Parquet files named by `paths`, in order; a folder gives its parquet files, sorted by name.

    key: configuration key the paths came from, for messages.
    Raises UserError for a path that does not exist or a folder without parquet files.
    """
    files: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        try:
            files += _expand(text, key)
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise UserError(f"{key}={text[:100]}: cannot be looked up ({error.strerror}); name another path") from error
    if not files:
        raise UserError(f"{key} names no file; set it to a parquet file, a folder or a list of them")
    return files


def _expand(text: str, key: str) -> list[Path]:
    if not text.strip():
        raise UserError(f"{key} names an empty path; take it out or name a file")
    path = Path(text).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        if not found:
            raise UserError(f"{key}={text}: the folder holds no *.parquet file; name the folder that does")
        return found
    if path.is_file():
        return [path]
    if any(mark in text for mark in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{key}={text}: no file matches the pattern (working directory {Path.cwd()})")
        return found
    if "://" in text:
        raise UserError(f"{key}={text}: remote files are not read yet; download the file and name its local path")
    hint = ""
    if not path.is_absolute() and not text.startswith(".") and len(path.parts) in (2, 3):
        hint = "; datasets of the Hugging Face hub are not fetched yet: download it and name the local file"
    raise UserError(f"{key}={text}: no such file or folder (working directory {Path.cwd()}){hint}")


def read_rows(files: Sequence[Path], *, key: str) -> Iterator[Row]:
    """All rows of the files in order, with flat memory.

    Raises UserError, naming the file, for one that cannot be read as parquet or holds no row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                twice = sorted({name for name in names if names.count(name) > 1})
                if twice:
                    raise UserError(f"{file}: column {twice[0]!r} stands there more than once; rename one of the two")
                if parquet.metadata.num_rows == 0:
                    raise UserError(f"{file}: the file holds no rows; remove it from {key} or write it again")
                index = 0
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
                    for values in _plain_rows(batch, file, index):
                        yield Row(values, str(file), index)
                        index += 1
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"{file}: cannot be read as parquet ({reason}); write it again or take it out of {key}"
            ) from error


def _plain_rows(batch: Any, file: Path, first: int) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as Python values; `first` is the number of its first row in the file."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(len(batch)):
            try:
                batch.slice(place, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}:{first + place}: a text is not valid UTF-8 ({error.reason}); write the row again"
                ) from error
        raise
