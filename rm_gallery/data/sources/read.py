"""Reading data files: chunks of rows with flat memory, or the rows themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rm_gallery.data.sources.records import LABELS, Chunk, DataFile, FileKind, Row, suffixes
from rm_gallery.data.sources.tables import read_arrow, read_parquet
from rm_gallery.data.sources.text_files import read_csv, read_json
from rm_gallery.errors import UserError, one_line

_READERS: dict[FileKind, Callable[[DataFile], Iterator[Chunk]]] = {
    "parquet": read_parquet, "jsonl": read_json, "csv": read_csv, "arrow": read_arrow,
}  # fmt: skip


def read_chunks(file: DataFile, *, key: str) -> Iterator[Chunk]:
    """The rows of a file in order, not decoded yet, in chunks of about 1,024 rows or 8 MB, whichever is less.

    Memory stays flat: a few chunks, and what the kind of file needs (see `read_parquet` and `read_arrow`).
    key: configuration key the file came from, for messages.
    Raises UserError, naming the file and the row it got to, for a file that cannot be read or holds no row.
    """
    import pyarrow as pa

    rows = 0
    try:
        for chunk in _READERS[file.kind](file):
            rows = chunk.first + len(chunk)
            yield chunk
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeError, MemoryError) as error:
        label = LABELS[file.kind] + (f" in {suffixes(file.name)[1]}" if suffixes(file.name)[1] else "")
        where, doing = (f"{file.name}:{rows}", "read on") if rows else (file.name, "read")
        raise UserError(
            f"{where}: cannot be {doing} as {label} ({one_line(error)}); write it again or take it out of {key}"
        ) from error
    if not rows:
        raise UserError(f"{file.name}: the file holds no rows; remove it from {key} or write it again")


def read_rows(files: Sequence[DataFile], *, key: str) -> Iterator[Row]:
    """All rows of the files in order, decoded in this process, with flat memory. Raises UserError as `read_chunks`."""
    for file in files:
        for chunk in read_chunks(file, key=key):
            yield from chunk.rows()
