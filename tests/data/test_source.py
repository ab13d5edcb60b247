"""Sources: which files are read, in which order, and what is said about files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.data.source import find_files, read_rows
from rm_gallery.errors import UserError
from tests.small import text_pairs, write_pairs

KEY = "data.train_files"


def find(paths: str | list[str]) -> list[str]:
    return [str(path) for path in find_files(paths, key=KEY)]


def read(*paths: str) -> list[str]:
    return [row.where for row in read_rows([Path(path) for path in paths], key=KEY)]


def test_a_folder_gives_its_parquet_files_sorted_by_name(in_tmp: Path) -> None:
    for name in ("b", "a", "c"):
        write_pairs(in_tmp / "data" / f"{name}.parquet", text_pairs(1))
    (in_tmp / "data" / "notes.txt").write_text("no data")
    assert find("data") == ["data/a.parquet", "data/b.parquet", "data/c.parquet"]


def test_a_glob_gives_sorted_files_and_a_list_keeps_its_order(in_tmp: Path) -> None:
    for name in ("b", "a", "other"):
        write_pairs(in_tmp / f"{name}.parquet", text_pairs(1))
    assert find("[ab].parquet") == ["a.parquet", "b.parquet"]
    assert find(["other.parquet", "a.parquet"]) == ["other.parquet", "a.parquet"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(in_tmp: Path) -> None:
    write_pairs(in_tmp / "a[1].parquet", text_pairs(1))
    assert find("a[1].parquet") == ["a[1].parquet"]


def test_a_tilde_means_the_home_folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    write_pairs(in_tmp / "pairs.parquet", text_pairs(1))
    assert find("~/pairs.parquet") == [str(in_tmp / "pairs.parquet")]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nope.parquet", "data.train_files=nope.parquet: no such file or folder (working directory "),
        ("empty", "data.train_files=empty: the folder holds no *.parquet file; name the folder that does"),
        ("no*.parquet", "data.train_files=no*.parquet: no file matches the pattern"),
        ("org/set/train.parquet", "datasets of the Hugging Face hub are not fetched yet: download it"),
        ("https://host/a.parquet", "remote files are not read yet; download the file"),
        (" ", "data.train_files names an empty path; take it out or name a file"),
        ("x" * 300, "cannot be looked up (File name too long); name another path"),
    ],
)
def test_a_path_without_data_is_named_with_what_to_do(in_tmp: Path, path: str, sentence: str) -> None:
    (in_tmp / "empty").mkdir()
    with pytest.raises(UserError) as error:
        find(path)
    assert sentence in str(error.value)


def test_rows_say_their_file_and_count_from_0_in_each(in_tmp: Path) -> None:
    write_pairs(in_tmp / "a.parquet", text_pairs(3), row_group_size=2)
    write_pairs(in_tmp / "b.parquet", text_pairs(1))
    assert read("a.parquet", "b.parquet") == ["a.parquet:0", "a.parquet:1", "a.parquet:2", "b.parquet:0"]


def test_rows_keep_counting_over_batches(in_tmp: Path) -> None:
    write_pairs(in_tmp / "a.parquet", [{"chosen": str(number), "rejected": ""} for number in range(2500)])
    rows = list(read_rows([Path("a.parquet")], key=KEY))
    assert [row.where for row in rows[1023:1026]] == ["a.parquet:1023", "a.parquet:1024", "a.parquet:1025"]
    assert [row.values["chosen"] for row in rows] == [str(number) for number in range(2500)]


def test_every_way_to_store_text_reads_as_text(in_tmp: Path) -> None:
    texts = ["a \U0001f600", "b\0", "a \U0001f600"]
    for array in (
        pa.array(texts),
        pa.array(texts, pa.large_string()),
        pa.array(texts, pa.string_view()),
        pa.array(texts).dictionary_encode(),
    ):
        pq.write_table(pa.table({"chosen": array}), "a.parquet")
        assert [row.values["chosen"] for row in read_rows([Path("a.parquet")], key=KEY)] == texts, array.type


def damaged(kind: str) -> bytes:
    write_pairs(Path("whole.parquet"), [{"chosen": "good " * 500, "rejected": "bad"}])
    whole = Path("whole.parquet").read_bytes()
    return {
        "truncated": whole[: len(whole) // 2],
        "text": b"chosen,rejected\ngood,bad\n",
        "empty": b"",
        "flipped": whole[:20] + bytes(60) + whole[80:],
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "flipped"])
def test_a_damaged_file_is_named_in_one_sentence(in_tmp: Path, kind: str) -> None:
    Path("a.parquet").write_bytes(damaged(kind))
    with pytest.raises(UserError) as error:
        read("a.parquet")
    assert str(error.value).startswith("a.parquet: cannot be read as parquet (")
    assert str(error.value).endswith("); write it again or take it out of data.train_files")
    assert "\n" not in str(error.value)


def test_a_file_without_rows_is_named(in_tmp: Path) -> None:
    pq.write_table(pa.table({"chosen": pa.array([], pa.string())}), "a.parquet")
    with pytest.raises(UserError, match=r"^a\.parquet: the file holds no rows; remove it from data\.train_files"):
        read("a.parquet")


def test_a_column_that_stands_there_twice_is_named(in_tmp: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"]), "a.parquet")
    with pytest.raises(UserError, match=r"^a\.parquet: column 'chosen' stands there more than once"):
        read("a.parquet")


def test_text_that_is_not_utf8_is_named_by_its_row(in_tmp: Path) -> None:
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 2, 4)))
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ok\xff\xfe"))
    pq.write_table(pa.table({"chosen": texts}), "a.parquet")
    with pytest.raises(UserError, match=r"^a\.parquet:1: a text is not valid UTF-8 .*; write the row again$"):
        read("a.parquet")


def test_a_folder_called_like_a_file_is_named(in_tmp: Path) -> None:
    (in_tmp / "data" / "a.parquet").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^data/a\.parquet: cannot be read as parquet \(.*directory\)"):
        read(*find("data"))
