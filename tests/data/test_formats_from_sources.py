"""Every format from every kind of source: the groups are those that the same rows give without a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row, SourceConfig, read_rows, resolve_files
from rm_gallery.schema import PreferenceGroup
from tests.data.damage import SAMPLES
from tests.data.formats.rows import read_all
from tests.data.sources.writing import KEY, WRITERS, save_to_disk, write

pytestmark = pytest.mark.slow

KINDS = [*WRITERS, "arrow folder", "folder", "glob", "memory URL"]
FLAT = ("csv", "tsv", "csv.gz")  # cells are text: lists and messages as their JSON


def make_rows(name: str) -> list[dict[str, Any]]:
    return [dict(SAMPLES[name].row) for _ in range(5)]


def groups_of(rows: Any) -> list[PreferenceGroup]:
    found, dropped = read_all(rows, FormatConfig())
    assert not dropped.total, dropped.describe()
    return [replace(group, where="") for group in found]


def place(kind: str, rows: list[dict[str, Any]]) -> str:
    """The rows as this kind of source; the words that name it."""
    if kind == "arrow folder":
        save_to_disk(Path("saved"), rows[:3], rows[3:])
        return "saved"
    if kind in ("folder", "glob"):
        write(Path("many/1.parquet"), rows[:2], like="a.parquet")
        write(Path("many/2.parquet"), rows[2:], like="a.parquet")
        return "many" if kind == "folder" else "many/*.parquet"
    if kind == "memory URL":
        write(Path("a.jsonl"), rows)
        with fsspec.open("memory://formats/a.jsonl", "wb") as file:
            file.write(Path("a.jsonl").read_bytes())
        return "memory://formats/a.jsonl"
    if kind.endswith(FLAT):
        rows = [{key: _flat(value) for key, value in row.items()} for row in rows]
    WRITERS[kind](Path(kind), rows)
    return kind


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_reads_the_same_from_this_source(kind: str, in_tmp: Path) -> None:
    for name in SAMPLES:
        rows = make_rows(name)
        wanted = groups_of(Row(row, "a", number) for number, row in enumerate(rows))
        files = resolve_files(SourceConfig(train_files=place(kind, rows)), key=KEY)
        assert groups_of(read_rows(files, key=KEY)) == wanted, name
