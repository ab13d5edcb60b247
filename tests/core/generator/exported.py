"""Cases for the tests of the export, and what stands in the files that it wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rm_gallery.core.generator import ExportSummary, export_data


def read_back(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that was written."""
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def export(cases: Any, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], ExportSummary]:
    """All rows of an export to one side, and its summary; both formats have the same columns."""
    options.setdefault("split_ratio", {"all": 1.0})
    summary = export_data(cases, folder, formats=["parquet", "jsonl"], overwrite=True, **options)
    rows = [row for file in summary.files if file.suffix == ".jsonl" for row in read_back(file)]
    in_parquet = [row for file in summary.files if file.suffix == ".parquet" for row in read_back(file)]
    assert [set(row) for row in in_parquet] == [set(row) for row in rows]
    assert len(rows) == summary.num_rows
    return rows, summary


def pairs_of(cases: Any, folder: Path, **options: Any) -> set[tuple[str, str]]:
    """(chosen, rejected) of all rows."""
    return {(row["chosen"], row["rejected"]) for row in export(cases, folder, **options)[0]}


def graded(count: int, *, prompts: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Single responses with scores of 0 to 4, several to a prompt."""
    draw = random.Random(seed)
    return [
        {"prompt": f"Question {draw.randrange(prompts)}?", "response": f"Answer {n}.", "score": draw.randrange(5)}
        for n in range(count)
    ]


def both_sides(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of train.parquet and of test.parquet."""
    return read_back(folder / "train.parquet"), read_back(folder / "test.parquet")
