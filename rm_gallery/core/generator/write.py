"""Files: all of an export, or none of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.core.generator.columns import Columns
from rm_gallery.core.generator.rows import Row
from rm_gallery.errors import UserError


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
                written[file] = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                _write(written[file], file.suffix, content, columns)
        _publish(rows, written, overwrite)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
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
        file.flush()
        os.fsync(file.fileno())


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
