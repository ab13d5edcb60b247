"""JSON lines and JSON lists: every good row is read, and every bad one is a fault of that row alone."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from rm_gallery.data.sources import text_files
from rm_gallery.errors import UserError
from tests.data.sources.writing import faults_of, rows_of, values_of

GOOD = b'{"chosen": "a", "rejected": "b"}'
GZIPPED, GZIPPED_PARQUET = (gzip.compress(content, mtime=0) for content in (GOOD, b"PAR1"))  # without the time

FAULTY: dict[str, tuple[bytes, str]] = {
    "text": (b"not json", "line that is not valid JSON"),
    "cut off": (GOOD[:-4], "line that is not valid JSON"),
    "two objects": (GOOD + GOOD, "line that is not valid JSON"),
    "single quotes": (b"{'chosen': 'a'}", "line that is not valid JSON"),
    "control character": (b'{"chosen": "a\x01"}', "line that is not valid JSON"),
    "NUL bytes": (b"\0\0\0\0", "line that is not valid JSON"),
    "a number of 5,000 digits": (b'{"chosen": ' + b"9" * 5000 + b"}", "line that is not valid JSON"),
    "list": (b'["a", "b"]', "JSON that is not an object"),
    "text in quotes": (b'"a"', "JSON that is not an object"),
    "number": (b"1.5", "JSON that is not an object"),
    "null": (b"null", "JSON that is not an object"),
    "true": (b"true", "JSON that is not an object"),
    "no UTF-8": (b'{"chosen": "\xff\xfe"}', "text that is not valid UTF-8"),
    "Latin-1": ('{"chosen": "\u00e9"}'.encode("latin-1"), "text that is not valid UTF-8"),
    "UTF-16": ('{"chosen": "a"}'.encode("utf-16-le"), "line that is not valid JSON"),
    "a surrogate as bytes": (b'{"chosen": "\xed\xa0\x80"}', "text that is not valid UTF-8"),
    "half a surrogate pair": (b'{"chosen": "a\\ud83d"}', "text with a lone surrogate"),
    "the other half": (b'{"chosen": {"content": ["\\uDE00"]}}', "text with a lone surrogate"),
    "a key with half a pair": (b'{"\\ud83d": "a"}', "text with a lone surrogate"),
    "10,000 lists deep": (b'{"chosen": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "JSON that is nested more than 100"),
    "10,000 objects deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "JSON that is nested more than 100 deep"),
    "120 deep": (b'{"a":' * 120 + b"1" + b"}" * 120, "JSON that is nested more than 100 deep"),
    "10,000 deep and cut off": (b'{"a":' * 10_000, "JSON that is nested more than 100 deep"),
    "a key twice": (b'{"chosen": "a", "chosen": "b"}', "JSON object with a duplicate key"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_bad_line_is_a_fault_between_two_good_rows(in_tmp: Path, case: str) -> None:
    line, fault = FAULTY[case]
    Path("a.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD]))
    rows = rows_of("a.jsonl")
    assert [bool(row.fault) for row in rows] == [False, True, False]
    assert rows[1].fault.startswith(fault) and rows[1].values == {} and rows[1].where == "a.jsonl:1"
    assert rows[0].values == rows[2].values == json.loads(GOOD)


UNPARSABLE = [case for case, (_, fault) in FAULTY.items() if "not valid JSON" in fault or case.startswith("10,000")]


@pytest.mark.parametrize("case", [case for case in FAULTY if case not in UNPARSABLE])
def test_a_bad_element_of_a_list_is_a_fault_between_two_good_rows(in_tmp: Path, case: str) -> None:
    line, fault = FAULTY[case]
    Path("a.json").write_bytes(b"[" + b",\n".join([GOOD, line, GOOD]) + b"]")
    faults = faults_of("a.json")
    assert list(faults) == [1] and faults[1].startswith(fault)


@pytest.mark.parametrize("case", UNPARSABLE)
def test_an_element_that_is_not_json_names_its_place(in_tmp: Path, case: str) -> None:
    Path("a.json").write_bytes(b"[" + b",\n".join([GOOD, FAULTY[case][0], GOOD]) + b"]")
    with pytest.raises(UserError, match=r"^a\.json:[12]: (the list is not valid JSON here; |JSON that is nested)"):
        rows_of("a.json")


@pytest.mark.parametrize(
    "value",
    ["\U0001f600 \u202e \u05d0", "\0", "\u2028", "a\\u0041", "[[[", "}{", "\\", "\\ud83d\\ude00 as text"],
    ids=lambda value: repr(value[:9]),
)  # fmt: skip
@pytest.mark.parametrize("ascii_only", [True, False])
def test_odd_text_is_read_as_it_is(in_tmp: Path, value: str, ascii_only: bool) -> None:
    rows = [{"chosen": value, "rejected": "b"}, {"chosen": "a", "rejected": value}]
    Path("a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8")
    Path("list.json").write_text(json.dumps(rows, ensure_ascii=ascii_only), encoding="utf-8")
    assert values_of("a.jsonl") == values_of("list.json") == rows


def test_cells_of_10_mb_are_read_whole(in_tmp: Path) -> None:
    rows = [{"chosen": "x" * 10_000_000, "rejected": "b"}] * 2
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("list.json").write_text(json.dumps(rows))
    assert values_of("a.jsonl") == values_of("list.json") == rows


def test_blank_lines_ends_of_windows_and_a_byte_order_mark_are_no_rows(in_tmp: Path) -> None:
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD + b"\n\n")
    Path("list.json").write_bytes(b"\xef\xbb\xbf \n[" + GOOD + b"\r\n,\t" + GOOD + b" ]\n\n")
    for name in ("a.jsonl", "list.json"):
        assert [(row.index, row.fault) for row in rows_of(name)] == [(0, ""), (1, "")], name


def test_elements_of_a_list_end_where_json_says(in_tmp: Path) -> None:
    rng = random.Random(0)
    rows = [{"".join(rng.choices('a"\\{[]},: \n', k=6)): ["".join(rng.choices('"\\{[]},:\u00e9', k=9)), {"b": [1, {}]}]}
            for _ in range(40)]  # fmt: skip
    Path("list.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert values_of("list.json") == rows


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a.json: the file has no rows; remove it from data.train_files or recreate it"),
        (b" \n\n", "a.json: the file has no rows; remove it from data.train_files or recreate it"),
        (b"[]", "a.json: the file has no rows; remove it from data.train_files or recreate it"),
        (b"[" + GOOD + b"," + GOOD[:-3], "a.json:1: the file ends inside the list; recreate it, or write JSON"),
        (b"[" + GOOD + b",", "a.json:1: the file ends inside the list; recreate it, or write JSON lines"),
        (b"[" + GOOD + b"] x", "a.json:1: text follows the end of the list; write one list, or one object per line"),
        (b'{\n"chosen": [],\n"rejected": []\n}', "a.json: one JSON object over several lines; write one object "),
        ("[]".encode("utf-16"), "a.json: holds UTF-16 text, not JSON lines in UTF-8; convert or rename it ("),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_rows_is_named(in_tmp: Path, content: bytes, sentence: str) -> None:
    Path("a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of("a.json")
    assert str(error.value).startswith(sentence)


def test_input_without_an_end_does_not_exhaust_memory(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_MAX_LIST_BYTES", 2 << 20)
    Path("a.jsonl").write_bytes(b'{"chosen": "' + b"x" * (20 << 20))
    tracemalloc.start()
    [row] = rows_of("a.jsonl", max_row_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert row.fault == f"row larger than data.max_row_bytes={1 << 20}" and row.where == "a.jsonl:0"
    Path("a.json").write_bytes(b"[" + GOOD + b"," + b" " * (5 << 20) + GOOD + b"]")
    with pytest.raises(UserError, match=r"^a\.json: a JSON list of more than 2 MiB is not read; write JSON lines, one"):
        rows_of("a.json")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9, 0.9999])
@pytest.mark.slow
def test_a_compressed_file_that_was_cut_off_is_never_read_as_whole(in_tmp: Path, name: str, keep: float) -> None:
    import pyarrow as pa

    rng = random.Random(0)
    rows = [{"chosen": rng.randbytes(200).hex(), "rejected": "b"} for _ in range(3000)]
    content = (
        json.dumps(rows).encode() if "json." in name else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    )
    whole = gzip.compress(content) if name.endswith("gz") else pa.compress(content, codec="zstd", asbytes=True)
    Path(name).write_bytes(whole)
    assert values_of(name) == rows
    Path(name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(
        UserError, match=rf"^{name}(:\d+)?: (cannot be read (further )?as JSON lines in |the file has no)"
    ):
        rows_of(name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_of_several_parts_is_read_whole(in_tmp: Path, name: str) -> None:
    import pyarrow as pa

    parts = [GOOD[:20], GOOD[20:] + b"\n" + GOOD]
    packed = [gzip.compress(part) if name.endswith("gz") else pa.compress(part, codec="zstd", asbytes=True)
              for part in parts]  # fmt: skip
    Path(name).write_bytes(b"".join(packed))
    assert values_of(name) == [json.loads(GOOD)] * 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", GZIPPED, "a.jsonl: holds gzip, not JSON lines in UTF-8; convert or rename it ("),
        ("a.jsonl", b"PAR1....", "a.jsonl: holds parquet, not JSON lines in UTF-8; convert or rename it ("),
        ("a.json", b"PK\x03\x04....", "a.json: holds a zip archive, not JSON lines in UTF-8; convert or "),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz: cannot be read as JSON lines in .gz (zlib inflate failed: incorrect header"),
        ("a.jsonl.zst", GOOD, "a.jsonl.zst: cannot be read as JSON lines in .zst ("),
        ("a.jsonl.gz", GZIPPED_PARQUET, "a.jsonl.gz: holds parquet, not JSON lines in UTF-8; convert or "),
    ],
)  # fmt: skip
def test_a_wrong_ending_is_named(in_tmp: Path, name: str, content: bytes, sentence: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(name)
    assert str(error.value).startswith(sentence)


def test_the_limit_of_a_row_counts_what_is_between_blanks(in_tmp: Path) -> None:
    row = json.dumps({"chosen": "x" * 50, "rejected": "b"}).encode()
    limit = len(row)
    for end in (b"\n", b"\r\n", b" \t" * 100 + b"\n", b""):
        Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\n" + b" " * 300 + b"\n" + row + end)
        assert [each.fault for each in rows_of("a.jsonl", max_row_bytes=limit)] == ["", ""]
        Path("a.jsonl").write_bytes(row + b"\n" + row + end)
        assert [bool(each.fault) for each in rows_of("a.jsonl", max_row_bytes=limit - 1)] == [True, True]
