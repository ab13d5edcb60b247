"""Reading data files: chunks of undecoded rows, or the rows themselves, with constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rm_gallery.data.sources.local import check_unchanged
from rm_gallery.data.sources.records import LABELS, Chunk, DataFile, FileKind, Row, suffixes
from rm_gallery.data.sources.remote import is_url
from rm_gallery.data.sources.tables import count_parquet, read_arrow, read_parquet
from rm_gallery.data.sources.text_files import read_csv, read_json
from rm_gallery.errors import UserError, one_line

_READERS: dict[FileKind, Callable[[DataFile, int], Iterator[Chunk]]] = {
    "parquet": read_parquet, "jsonl": read_json, "csv": read_csv, "arrow": read_arrow,
}  # fmt: skip


def read_chunks(file: DataFile, *, key: str, start: int = 0) -> Iterator[Chunk]:
    """The rows of a file in order, undecoded, in chunks of about 1,024 rows or 8 MB, whichever is less.

    Memory stays constant: a few chunks, and what the kind of file needs (see `read_parquet` and `read_arrow`).
    key: configuration key or option that named the file, for messages.
    start: rows to skip, for resuming; rows keep their number (`Chunk.first`).
    Raises UserError, naming the file and the row it reached, for a file that cannot be read, holds no row, or changed
    since it was resolved.
    """
    end = 0
    is_local = not is_url(file.path)
    with _describe_errors(file, key, lambda: end):
        if is_local:
            check_unchanged(file)
        for chunk in _READERS[file.kind](file, start):
            end = chunk.first + len(chunk)
            if end > start:
                yield chunk.skip(start - chunk.first) if chunk.first < start else chunk
        if is_local:
            check_unchanged(file)
    if not end and not start:
        raise UserError(f"{file.name}: the file has no rows; remove it from {key} or recreate it")


@contextmanager
def _describe_errors(file: DataFile, key: str, row: Callable[[], int]) -> Iterator[None]:
    """Turn what reading raises into a UserError that names the file and the row reached."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeError, MemoryError) as error:
        label = LABELS[file.kind] + (f" in {suffixes(file.name)[1]}" if suffixes(file.name)[1] else "")
        where, doing = (f"{file.name}:{row()}", "read further") if row() else (file.name, "read")
        raise UserError(
            f"{where}: cannot be {doing} as {label} ({one_line(error)}); recreate it or remove it from {key}"
        ) from error


def read_rows(files: Sequence[DataFile], *, key: str, start: int = 0) -> Iterator[Row]:
    """All rows of the files in order, decoded in this process, with constant memory.

    A row that cannot be decoded keeps its place: `Row.fault` gives the reason and `Row.values` is empty.
    start: rows of each file to skip. Raises UserError as `read_chunks`.
    """
    for file in files:
        for chunk in read_chunks(file, key=key, start=start):
            yield from chunk.rows()


def count_rows(file: DataFile, *, key: str) -> int:
    """Number of rows of a file; parquet has it in the footer, other kinds are read once without decoding rows.

    Raises UserError as `read_chunks`.
    """
    if file.kind != "parquet":
        return sum(map(len, read_chunks(file, key=key)))
    with _describe_errors(file, key, lambda: 0):
        count = count_parquet(file)
    if not count:
        raise UserError(f"{file.name}: the file has no rows; remove it from {key} or recreate it")
    return count
