"""Sources: files as rows, each with the place it came from (`file:row`).

In: paths, URLs and hub data sets from the configuration. Out: `DataFile` records, chunks of their rows that a worker
decodes, and `Row` records, all with flat memory.
"""

from rm_gallery.data.sources.config import (
    FileEntry,
    SourceConfig,
    as_entries,
    check_val_fraction,
    entries_of,
    entry_problems,
)
from rm_gallery.data.sources.read import read_chunks, read_rows
from rm_gallery.data.sources.records import Chunk, DataFile, Row
from rm_gallery.data.sources.resolve import find_files, resolve_files

__all__ = [
    "SourceConfig", "FileEntry", "entries_of", "as_entries", "entry_problems", "check_val_fraction",
    "find_files", "resolve_files", "DataFile",
    "read_chunks", "Chunk", "read_rows", "Row",
]  # fmt: skip
