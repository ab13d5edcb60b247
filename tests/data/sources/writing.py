"""The same rows as every kind of file that is read, and short ways to read files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from rm_gallery.data.sources import DataFile, Row, SourceConfig, read_rows, resolve_files

KEY = "data.train_files"
Rows = Sequence[dict[str, Any]]
PAIRS: Rows = [{"chosen": f'good {number} \U0001f600, "yes"\nok', "rejected": f"bad {number}"} for number in range(5)]


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _csv(path: Path, rows: Rows, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _arrow(path: Path, rows: Rows, open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2),
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(lines(rows)[:-1]),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "list.json": lambda path, rows: path.write_text(json.dumps(list(rows), indent=2)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(pa.compress(lines(rows), codec="zstd", asbytes=True)),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(list(rows)).encode())),
    "a.csv": _csv,
    "a.tsv": lambda path, rows: _csv(path, rows, "\t"),
    "a.csv.gz": lambda path, rows: (_csv(path, rows), path.write_bytes(gzip.compress(path.read_bytes()))),
    "stream.arrow": lambda path, rows: _arrow(path, rows, pa.ipc.new_stream),
    "file.arrow": lambda path, rows: _arrow(path, rows, pa.ipc.new_file),
    "a.feather": lambda path, rows: feather.write_feather(pa.Table.from_pylist(list(rows)), path, compression="lz4"),
}


def write(path: Path, rows: Rows = PAIRS, *, like: str = "") -> Path:
    """Rows as the kind of file that the name says (`like` where names of one kind differ)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[like or f"a{''.join(path.suffixes)}"](path, rows)
    return path


def save_to_disk(folder: Path, *shards: Rows) -> None:
    """A folder as `Dataset.save_to_disk` of the datasets library leaves it."""
    names = [f"data-{place:05d}-of-{len(shards):05d}.arrow" for place in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write(folder / name, rows, like="stream.arrow")
    folder.mkdir(parents=True, exist_ok=True)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def resolve(*paths: str, key: str = KEY, **options: Any) -> list[DataFile]:
    """Files that these paths name, as training would find them."""
    return resolve_files(SourceConfig(**{key.removeprefix("data."): paths}, **options), key=key)


def rows_of(*paths: str, **options: Any) -> list[Row]:
    return list(read_rows(resolve(*paths, **options), key=options.get("key", KEY)))


def values_of(*paths: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of files that hold no fault."""
    rows = rows_of(*paths, **options)
    assert not [row for row in rows if row.fault]
    return [row.values for row in rows]


def faults_of(*paths: str) -> dict[int, str]:
    """Faults by number of the row."""
    return {row.index: row.fault for row in rows_of(*paths) if row.fault}
