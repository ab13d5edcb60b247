"""Parquet and Arrow files as chunks of record batches, and a batch as rows; opening and decompressing data files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rm_gallery.data.sources.local import check_unchanged
from rm_gallery.data.sources.records import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    COMPRESSIONS,
    KNOWN,
    LABELS,
    Chunk,
    DataFile,
    FaultyChunk,
    Row,
    suffixes,
    too_large,
)
from rm_gallery.data.sources.remote import is_url, open_remote
from rm_gallery.errors import UserError

NOT_UTF8 = "text that is not valid UTF-8"
# Bytes read ahead per column of a parquet file; without a limit, or with `pre_buffer`, it would be a whole row group.
_LOCAL_BUFFER, _REMOTE_BUFFER = 1 << 20, 4 << 20


@dataclass(frozen=True)
class ArrowChunk(Chunk):
    """Rows as a record batch."""

    batch: Any
    """pyarrow.RecordBatch; pickled without other rows that share its memory."""

    def __len__(self) -> int:
        return len(self.batch)

    def skip(self, count: int) -> ArrowChunk:
        return ArrowChunk(self.file, self.first + count, self.batch.slice(count))

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)
        return _unpickled, (self.file, self.first, sink.getvalue().to_pybytes())

    def rows(self) -> Iterator[Row]:
        batch = _with_text_for_times(self.batch)
        try:
            for offset, values in enumerate(batch.to_pylist()):
                yield Row(values, self.file, self.first + offset, has_added_nulls=True)
        except _UNREADABLE:
            for offset in range(len(batch)):
                yield _lone_row(batch.slice(offset, 1), self.file, self.first + offset)


def _unpickled(file: str, first: int, data: bytes) -> ArrowChunk:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        return ArrowChunk(file, first, reader.read_next_batch())


# What pyarrow raises for a cell that Python has no value for: text that is not UTF-8, a date after the year 9999, a
# struct with a duplicate field. Its own errors derive from these.
_UNREADABLE = (ValueError, OverflowError, NotImplementedError, KeyError)


def _lone_row(batch: Any, file: str, index: int) -> Row:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            return Row({}, file, index, f"{name} with {NOT_UTF8}")
        except _UNREADABLE:
            return Row({}, file, index, f"{name} with a value that Python cannot hold")
    return Row(batch.to_pylist()[0], file, index, has_added_nulls=True)


def _with_text_for_times(batch: Any) -> Any:
    """The batch with times as text: Python has no nanoseconds, and metadata must be plain JSON."""
    import pyarrow as pa

    for place, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type):
            column = batch.column(place)
            try:
                text = column.cast(pa.string())
            except pa.ArrowException:  # a duration, or an unknown time zone
                text = column.cast(pa.int64() if field.type.bit_width == 64 else pa.int32())
            batch = batch.set_column(place, field.name, text)
    return batch


def read_parquet(file: DataFile, start: int = 0) -> Iterator[Chunk]:
    """Chunks of a parquet file. Memory: per column a buffer and a page, and a batch; not a whole row group.

    Row groups that end before row `start` are not read.
    """
    import pyarrow.parquet as pq

    remote = is_url(file.path)
    with open_bytes(file) as stream:
        source: Any = stream if remote else file.path
        buffer = _REMOTE_BUFFER if remote else _LOCAL_BUFFER
        with pq.ParquetFile(source, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True) as parquet:
            check_names(file.name, parquet.schema_arrow.names)
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                facts = parquet.metadata.row_group(group)
                if first + facts.num_rows <= start:
                    first += facts.num_rows
                    continue
                bytes_per_row = max(1, facts.total_byte_size // max(1, facts.num_rows))
                size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // bytes_per_row))
                for batch in parquet.iter_batches(batch_size=size, row_groups=[group]):
                    for chunk in _chunks(batch, file, first):
                        yield chunk
                        first += len(chunk)


def count_parquet(file: DataFile) -> int:
    """Number of rows, from the footer."""
    import pyarrow.parquet as pq

    with open_bytes(file) as stream, pq.ParquetFile(stream if is_url(file.path) else file.path) as parquet:
        return int(parquet.metadata.num_rows)


def read_arrow(file: DataFile, start: int = 0) -> Iterator[Chunk]:
    """Chunks of an Arrow file in stream or file format.

    Memory: one record batch, whose size the writer chose; none of it for an uncompressed local file, which is mapped.
    """
    import pyarrow as pa

    with open_bytes(file) as stream:
        head = stream.read(8)
        if head.startswith(b"FEA1"):
            raise UserError(f"{file.name}: Feather version 1 is not read; recreate it with a newer library")
        if not head:
            return
        stream.seek(0)
        source = pa.PythonFile(stream, "r") if is_url(file.path) else pa.memory_map(file.path)
        with source:
            first = 0
            for batch in _record_batches(source, file, is_file=head.startswith(b"ARROW1")):
                check_names(file.name, batch.schema.names)
                if first + len(batch) > start:
                    yield from _sound_chunks(batch, file, first)
                first += len(batch)


def _record_batches(source: Any, file: DataFile, *, is_file: bool) -> Iterator[Any]:
    import pyarrow as pa

    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        while True:
            if not is_url(file.path):
                check_unchanged(file)  # reading a mapped file that was truncated ends the process (SIGBUS)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _sound_chunks(batch: Any, file: DataFile, first: int) -> Iterator[Chunk]:
    """Chunks of a batch read from a file, after a check that its offsets stay inside its buffers."""
    import pyarrow as pa

    for start in range(0, len(batch), CHUNK_ROWS):
        rows = batch.slice(start, CHUNK_ROWS)
        place = first + start
        try:
            rows.validate(full=True)
        except pa.ArrowInvalid:
            yield from _lone_chunks(rows, file, place)
            continue
        yield from _chunks(rows, file, place)


def _lone_chunks(rows: Any, file: DataFile, first: int) -> Iterator[Chunk]:
    """A chunk per row, for a batch of which at least one row is damaged."""
    for offset in range(len(rows)):
        row = rows.slice(offset, 1)
        fault = _fault(row)
        if fault:
            yield FaultyChunk(file.name, first + offset, fault)
        else:
            yield from _chunks(row, file, first + offset)


def _fault(row: Any) -> str:
    """What is wrong with a batch of one row, or ''."""
    import pyarrow as pa

    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            is_text = "utf8" in str(error).lower().replace("-", "")
            return f"{name} with {NOT_UTF8}" if is_text else f"{name} with a damaged value"
    return ""


def _chunks(batch: Any, file: DataFile, first: int) -> Iterator[Chunk]:
    """The batch as chunks of at most 8 MiB, or of one row; copied where a slice would keep the memory of all rows."""
    import pyarrow as pa

    limit = file.max_row_bytes
    half = len(batch) // 2
    if half and max(batch.nbytes, _expanded_bytes(batch)) > min(CHUNK_BYTES, limit):
        yield from _chunks(batch.slice(0, half), file, first)
        yield from _chunks(batch.slice(half), file, first + half)
        return
    plain = pa.schema([field.with_type(_plain_type(field.type)) for field in batch.schema])
    if plain != batch.schema:
        batch = batch.cast(plain)
    if len(batch) == 1 and batch.nbytes > limit:
        yield too_large(file, first)
    elif len(batch):
        yield ArrowChunk(file.name, first, batch)


def _expanded_bytes(batch: Any) -> int:
    """At most how many bytes columns with dictionaries have without them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and column.dictionary.nbytes * len(batch) > CHUNK_BYTES:
            try:
                size += (pc.max(pc.binary_length(column.dictionary)).as_py() or 0) * len(batch)
            except pa.ArrowNotImplementedError:  # values of another type than text
                size += column.dictionary.nbytes * len(batch)
    return size


def _plain_type(kind: Any) -> Any:
    """The type without dictionaries and views, whose slices keep the memory of all rows."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    return kind


def check_names(file: str, names: list[str]) -> None:
    """Raise UserError for a duplicate column: either could be meant."""
    duplicate = min((name for name in names if names.count(name) > 1), default=None)
    if duplicate is not None:
        raise UserError(f"{file}: duplicate column {duplicate!r}; rename one of the two")


_BUFFER = 1 << 20
# First bytes of kinds of files that are not text.
_MAGIC = {
    b"PAR1": "parquet", b"ARROW1": "Arrow", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2",
    b"\xfd7zXZ": "xz", b"PK\x03\x04": "a zip archive", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
}  # fmt: skip


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """The raw (compressed) file; seekable."""
    with open_remote(file.path) if is_url(file.path) else Path(file.path).open("rb", buffering=_BUFFER) as stream:
        yield stream


@contextmanager
def open_text(file: DataFile) -> Iterator[io.BufferedReader]:
    """The bytes of a text file, decompressed if its name ends in .gz or .zst.

    Raises UserError for a file whose first bytes are those of another kind of file.
    """
    import pyarrow as pa

    compression = COMPRESSIONS.get(suffixes(file.name)[1])
    with ExitStack() as stack:
        raw: Any = stack.enter_context(open_bytes(file))
        if compression is not None:
            raw = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression))
        stream = io.BufferedReader(raw, _BUFFER)
        start = stream.peek(8)
        for magic, held in _MAGIC.items():
            if start.startswith(magic):
                label = LABELS[file.kind]
                raise UserError(f"{file.name}: holds {held}, not {label} in UTF-8; convert or rename it ({KNOWN})")
        yield stream
