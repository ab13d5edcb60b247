"""CSV: cells are text, what spreadsheets and pandas write is read, and damage stays with its row."""

from __future__ import annotations

import csv
import random
import tracemalloc
from pathlib import Path

import pandas as pd
import pytest

from rm_gallery.data.sources import text_files
from rm_gallery.errors import UserError
from tests.data.sources.writing import KEY, faults_of, resolve, rows_of, values_of

GOOD = b"a,b\n"
HEADER = b"chosen,rejected\n"


def write(content: bytes, name: str = "a.csv") -> str:
    Path(name).write_bytes(content)
    return name


def test_cells_are_text_and_empty_ones_are_none(in_tmp: Path) -> None:
    write(b"chosen,score,note\n42,0.5,\n,NaN,null\n")
    assert values_of("a.csv") == [
        {"chosen": "42", "score": "0.5", "note": None}, {"chosen": None, "score": "NaN", "note": "null"},
    ]  # fmt: skip


def test_odd_text_survives_what_pandas_writes(in_tmp: Path) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices('a",\n; \t\u00e9\U0001f600\0', k=12)) + "." for _ in range(200)]
    texts += ["a\r\nb", "x" * 1_000_000]
    pd.DataFrame({"chosen": texts, "rejected": texts[::-1]}).to_csv("a.csv")  # its first column has no name
    assert values_of("a.csv") == [
        {"chosen": good, "rejected": bad} for good, bad in zip(texts, texts[::-1], strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"chosen;rejected\na,b;c\n",
        b"chosen\trejected\na,b\tc\n",
        b'\xef\xbb\xbfchosen,rejected\r\n"a,b",c\r\n\r\n',
        b'chosen,rejected\r"a,b",c',
        b'chosen,rejected,\n"a,b",c,\n',
    ],
    ids=["semicolon", "tab", "byte order mark", "old ends", "comma at the end"],
)
def test_what_spreadsheets_write_is_read(in_tmp: Path, content: bytes) -> None:
    assert values_of(write(content)) == [{"chosen": "a,b", "rejected": "c"}]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"a\n", "row with fewer cells than the header"),
        (b"a,b,c\n", "row with more cells than the header"),
        (b"\xff,b\n", "text that is not valid UTF-8"),
        (b'"a"b,c\n', "row that is not valid CSV"),
    ],
)
def test_a_bad_row_is_a_fault_between_two_good_ones(in_tmp: Path, line: bytes, fault: str) -> None:
    rows = rows_of(write(HEADER + GOOD + line + GOOD))
    assert [row.fault for row in rows] == ["", fault, ""]
    assert [row.where for row in rows] == ["a.csv:0", "a.csv:1", "a.csv:2"]
    assert [row.values for row in rows] == [{"chosen": "a", "rejected": "b"}, {}, {"chosen": "a", "rejected": "b"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a.csv: the file has no rows; remove it from data.train_files or recreate it"),
        (HEADER, "a.csv: the file has no rows; remove it from data.train_files or recreate it"),
        (b"\n\n", "a.csv: the file has no rows; remove it from data.train_files or recreate it"),
        (b"chosen,chosen\na,b\n", "a.csv: duplicate column 'chosen'; rename one of the two"),
        (HEADER + GOOD + b'a,"b\n' + GOOD * 9, "a.csv:1: a quoted cell starts here and never ends; close the quote"),
        (b'"chosen"x,rejected\n', "a.csv: the header is not valid CSV; recreate the file"),
        (b'"chosen,rejected\n', "a.csv: a quoted cell starts here and never ends; close the quote"),
        (b"\xff\xfec\0h\0", "a.csv: holds UTF-16 text, not CSV in UTF-8; convert or rename it ("),
    ],
)
def test_a_file_that_cannot_be_read_is_named(in_tmp: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        rows_of(write(content))
    assert str(error.value).startswith(sentence)


@pytest.mark.slow
def test_a_quote_that_never_ends_does_not_fill_the_memory(in_tmp: Path) -> None:
    write(HEADER + GOOD + b'a,"b' + b"a line\n" * 1_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"^a\.csv:1: a quoted cell starts here and never ends; close the quote$"):
        rows_of("a.csv", max_row_bytes=100_000)
    assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "row",
    [
        b"a" * 300 + b",b\n",
        b"a," + b"b" * 2000 + b"\r\n",
        b"," * 300 + b"\n",
        b"a," * 300 + b'"\n"\n',
        b'"' + b"a,\n" * 300 + b'",b\n',
        b'"' + b'a,""\r\n' * 300 + b'",b\n',
        b'"' + b'""' * 300 + b'","' + b'""' * 301 + b'"\n',
        b'"a' + b'""",""' * 100 + b'","\n\n"\n',
        b'a"' * 300 + b",b\n",
        "\U0001f600,".encode() * 60 + b"b\n",
        b'"a"' + b"b" * 300 + b"\n",  # not valid CSV, and too large
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_a_row_that_is_too_large_ends_where_the_csv_module_ends_it(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, row: bytes, piece: int
) -> None:
    monkeypatch.setattr(text_files, "_PIECE", piece)
    content = HEADER + GOOD + row + GOOD + row + row + GOOD
    Path("a.csv").write_bytes(content)
    found = rows_of("a.csv", max_row_bytes=200)
    fault = "row larger than data.max_row_bytes=200"
    assert [each.fault for each in found] == ["", fault, "", fault, fault, ""]
    assert [each.index for each in found] == list(range(6))
    assert len({tuple(each.values.items()) for each in found if not each.fault}) == 1


def test_cells_of_10_mb_are_read_whole(in_tmp: Path) -> None:
    text = 'x"y' * 3_500_000
    with Path("a.csv").open("w") as file:
        csv.writer(file).writerows([["chosen"], [text], ["short"]])
    assert [values["chosen"] for values in values_of("a.csv")] == [text, "short"]


def test_text_that_looks_like_bytes_gone_wrong_is_kept(in_tmp: Path) -> None:
    assert faults_of(write(HEADER + "\ufffd,\u00ff\n".encode())) == {}
    assert resolve("a.csv", key=KEY)[0].kind == "csv"
