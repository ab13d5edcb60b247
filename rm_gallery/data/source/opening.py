"""Opening a data file, local or remote: its bytes, decompressed where the name says so."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from rm_gallery.data.source.names import COMPRESSIONS, KNOWN, suffixes
from rm_gallery.data.source.records import DataFile
from rm_gallery.data.source.remote_file import is_url, open_remote
from rm_gallery.errors import UserError

_BUFFER = 1 << 20
# What the first bytes of a file say it is, when its name says that it is text.
_MAGIC = {
    b"PAR1": "parquet", b"ARROW1": "Arrow", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2",
    b"\xfd7zXZ": "xz", b"PK\x03\x04": "a zip archive", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
}  # fmt: skip


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """The file as it lies there; it can seek."""
    with open_remote(file.path) if is_url(file.path) else Path(file.path).open("rb", buffering=_BUFFER) as stream:
        yield stream


@contextmanager
def open_text(file: DataFile) -> Iterator[io.BufferedReader]:
    """The bytes of a text file, decompressed when its name ends in .gz or .zst.

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
                raise UserError(
                    f"{file.name}: holds {held}, which its name does not say; convert or rename it ({KNOWN})"
                )
        yield stream
