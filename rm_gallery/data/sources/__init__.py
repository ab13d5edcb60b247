"""Sources: rows of data files, each with its location (`file:row`). Every command that reads rows reads them here.

    resolve_files(config, key="data.train_files") -> [DataFile]   training and validation files of the configuration
    resolve_entries(paths, key="--input") -> [DataFile]           the same for paths of any other option
    count_rows(file, key=...) -> int                              without decoding a row
    read_rows([file], key=..., start=n) -> Row                    in order; skips n rows to resume
    read_chunks(file, key=..., start=n) -> Chunk                  undecoded rows, for worker processes
    save_rows(data, folder, name) -> Path                         a DataFrame, dataset or list of dicts as a file

A path is a file (parquet, JSON lines, a JSON list, CSV, Arrow; text also compressed), a folder, a glob, a URL or a
dataset of the Hugging Face hub. A row that cannot be decoded, or is above `data.max_row_bytes`, stays in place with
`Row.fault`, its reason. Rows count
from 0 and without blank lines, so `row.index` equals its position in `count_rows`. Memory stays constant.

To copy rows as they are, use the chunk: `ArrowChunk.batch` (a record batch with the schema of the file, without
dictionaries), `LineChunk.lines` (the bytes of each JSON object), `CellChunk.names` and `.cells` (CSV).
"""

from rm_gallery.data.sources.config import (
    FileEntry,
    SourceConfig,
    as_entries,
    check_val_fraction,
    entries_of,
    entry_problems,
)
from rm_gallery.data.sources.memory import save_rows
from rm_gallery.data.sources.read import count_rows, read_chunks, read_rows
from rm_gallery.data.sources.records import Chunk, DataFile, Row
from rm_gallery.data.sources.resolve import find_files, resolve_entries, resolve_files

__all__ = [
    "SourceConfig", "FileEntry", "entries_of", "as_entries", "entry_problems", "check_val_fraction",
    "find_files", "resolve_files", "resolve_entries", "DataFile",
    "read_chunks", "Chunk", "read_rows", "Row", "count_rows", "save_rows",
]  # fmt: skip
