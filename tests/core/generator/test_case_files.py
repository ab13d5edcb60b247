"""Files of cases: parquet, JSON lines, lists in JSON, folders; and files that are damaged."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.errors import UserError
from tests.core.generator.exported import export

CASES: list[dict[str, Any]] = [
    {"prompt": f"Question {n}?", "response_a": "b", "response_b": f"g {n}", "score_a": 1.0, "score_b": 2.0}
    for n in range(5)
]
LINES = [json.dumps(case) for case in CASES]


def write(path: Path, cases: list[dict[str, Any]] = CASES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(cases), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(cases, indent=1))
    else:
        path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("kind", [str, Path, lambda path: [path], lambda path: path.parent])
def test_files_hold_the_same_cases_as_lists(suffix: str, kind: Any, tmp_path: Path) -> None:
    expected, _ = export(CASES, tmp_path / "a")
    assert export(kind(write(tmp_path / f"in/cases{suffix}")), tmp_path / "b")[0] == expected


def test_compressed_files_csv_and_globs_are_read_as_training_reads_them(tmp_path: Path) -> None:
    expected, _ = export(CASES, tmp_path / "a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cases-1.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES[:2]).encode()))
    (tmp_path / "in/cases-2.jsonl").write_text("\n".join(LINES[2:]))
    assert export(str(tmp_path / "in/cases-*.jsonl*"), tmp_path / "b")[0] == expected
    with (tmp_path / "cases.csv").open("w") as file:
        writer = csv.DictWriter(file, CASES[0])
        writer.writeheader()
        writer.writerows(CASES)
    assert export(tmp_path / "cases.csv", tmp_path / "c")[0] == expected


def test_several_files_and_folders_are_read_together(tmp_path: Path) -> None:
    for number, name in enumerate(("one.parquet", "in/two.jsonl", "in/three.json", "in/notes.txt", "in/.hidden.jsonl")):
        write(tmp_path / name, CASES[number : number + 1])
    rows, summary = export([tmp_path / "one.parquet", str(tmp_path / "in")], tmp_path / "out")
    assert summary.num_cases == 3
    assert {row["chosen"] for row in rows} == {"g 0", "g 1", "g 2"}


def test_json_lines_may_be_called_json_and_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(LINES).encode())
    assert len(export(path, tmp_path / "out")[0]) == 5
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(CASES).encode())
    assert len(export(path, tmp_path / "out")[0]) == 5


def test_parquet_with_scores_as_integers_lists_and_messages(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "Q", "name": None}], [{"role": "user", "content": "R", "name": "me"}]]
    cases = [{"messages": turns[n], "responses": ["b", "g"], "scores": [n, 3]} for n in range(2)]
    rows, _ = export(write(tmp_path / "cases.parquet", cases), tmp_path / "out")
    assert sorted((row["prompt"][0].get("name", ""), row["margin"]) for row in rows) == [("", 3.0), ("me", 2.0)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"score_a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b"\0", "not valid JSON"),
        (LINES[0].encode().replace(b"1.0", b"NaN"), "score that is not finite"),
        (LINES[0].encode().replace(b"1.0", b"-Infinity"), "score that is not finite"),
        (LINES[0].encode().replace(b"1.0", b"1e999"), "score that is not finite"),
        (LINES[0].encode().replace(b"1.0", b"true"), "score that is true or false"),
        (LINES[0].encode().replace(b"g 0", b"\\ud800"), "lone surrogate"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_counted_with_its_place(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b"\n".join([LINES[1].encode(), b"", line, LINES[2].encode()]))
    rows, summary = export(path, tmp_path / "out")
    assert sorted(row["chosen"] for row in rows) == ["g 1", "g 2"]
    [(found, example)] = summary.examples.items()
    assert reason in found and example == f"{path}:1"


def test_a_row_of_parquet_that_is_not_utf8_is_counted_with_its_place(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(CASES)
    broken = pa.array([b"g 0", b"g 1", b"\xff", b"g 3", b"g 4"], pa.binary()).view(pa.string())
    pq.write_table(
        table.set_column(table.schema.get_field_index("response_b"), "response_b", broken), tmp_path / "x.parquet"
    )
    rows, summary = export(tmp_path / "x.parquet", tmp_path / "out")
    assert len(rows) == 4
    assert summary.examples == {"response_b with text that is not valid UTF-8": f"{tmp_path}/x.parquet:2"}


def double_column(path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), path)


@pytest.mark.parametrize(
    ("name", "make", "what"),
    [
        ("x.parquet", lambda path: path.write_bytes(b"PAR1 nothing"), "cannot be read as parquet"),
        ("x.parquet", lambda path: path.write_bytes(b""), "cannot be read as parquet"),
        ("x.parquet", lambda path: path.write_bytes(write(path).read_bytes()[:-100]), "cannot be read as parquet"),
        ("x.parquet", double_column, "duplicate column 'prompt'"),
        ("x.json", lambda path: path.write_text("[{]"), "not valid JSON"),
        ("x.json", lambda path: path.write_text("[" * 100_000), "nested more than 100 deep"),
        ("x.jsonl", lambda path: path.write_text(""), "the file has no rows"),
        ("x.csv", lambda path: path.write_text("prompt"), "the file has no rows"),
        ("x.txt", lambda path: path.write_text("prompt"), "files that end in .txt are not read"),
        ("x.jsonl", lambda path: path.mkdir(), "the folder has no data file"),
        ("x.jsonl", lambda path: None, "no such file or folder"),
        ("x" * 300, lambda path: None, "cannot be looked up"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, make: Any, what: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=what) as caught:
        export_data(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_path_is_not_the_working_directory(in_tmp: Path) -> None:
    write(in_tmp / "cases.jsonl")
    with pytest.raises(UserError, match="empty path"):
        export_data("", "out")


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in/cases.jsonl")
    with pytest.raises(UserError, match="listed twice"):
        export_data([path, tmp_path / "in"], tmp_path / "out")
