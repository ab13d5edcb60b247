"""Parquet and Arrow: every type reads as plain values, damage is named, and chunks carry no more than their rows."""

from __future__ import annotations

import datetime
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.data.sources import read_chunks
from rm_gallery.errors import UserError
from tests.data.sources.writing import KEY, PAIRS, faults_of, resolve, rows_of, values_of, write

TEXTS = ["a \U0001f600", "b\0", "a \U0001f600"]


def as_stream(table: pa.Table, path: str = "a.arrow", **options: Any) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, **options)


def as_file(table: pa.Table, path: str = "a.feather") -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_way_to_store_text_reads_as_text(in_tmp: Path, kind: Any) -> None:
    table = pa.table({"chosen": pa.array(TEXTS).cast(kind), "list": pa.array([[text] for text in TEXTS])})
    pq.write_table(table, "a.parquet")
    as_stream(table)
    as_file(table)
    for name in ("a.parquet", "a.arrow", "a.feather"):
        assert values_of(name) == [{"chosen": text, "list": [text]} for text in TEXTS], name


def test_messages_keep_their_fields(in_tmp: Path) -> None:
    messages = [{"role": "user", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1.5}}]}]
    table = pa.table({"chosen": pa.array([messages, None, []])})
    pq.write_table(table, "a.parquet")
    as_stream(table)
    for name in ("a.parquet", "a.arrow"):
        assert [values["chosen"] for values in values_of(name)] == [messages, None, []]


def test_times_are_text_and_never_fail_a_row(in_tmp: Path) -> None:
    day = datetime.date(2024, 2, 29)
    table = pa.table({
        "chosen": ["a", "b"],
        "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
        "far": pa.array([2**62, 0], pa.timestamp("us")),
        "day": pa.array([day, day]),
        "zone": pa.array([0, 0], pa.timestamp("s", "Mars/Olympus")),
        "took": pa.array([7, 8], pa.duration("s")),
    })  # fmt: skip
    as_stream(table)
    rows = rows_of("a.arrow")
    assert [row.fault for row in rows] == ["", ""]
    assert rows[0].values == {
        "chosen": "a", "nanoseconds": "1970-01-01 00:00:00.000000001", "far": rows[0].values["far"],
        "day": "2024-02-29", "zone": 0, "took": "7",
    }  # fmt: skip


WRITE = {"a.parquet": pq.write_table, "a.arrow": as_stream, "a.feather": as_file}


def bad_text(*texts: bytes) -> pa.Array:
    """Texts of these bytes, whether they are UTF-8 or not."""
    places = [sum(map(len, texts[:number])) for number in range(len(texts) + 1)]
    offsets = pa.py_buffer(b"".join(place.to_bytes(4, "little") for place in places))
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(texts)))


@pytest.mark.parametrize("name", WRITE)
def test_text_that_is_not_utf8_is_a_fault_of_its_row(in_tmp: Path, name: str) -> None:
    texts = bad_text(b"ok", b"\xff\xfe", b"\xed\xa0\x80", b"fine")
    table = pa.table({"chosen": texts, "rejected": ["a", "b", "c", "d"]})
    WRITE[name](table, name)
    assert faults_of(name) == dict.fromkeys((1, 2), "chosen with text that is not valid UTF-8")
    assert [row.values.get("chosen") for row in rows_of(name)] == ["ok", None, None, "fine"]


def test_a_struct_with_two_fields_of_one_name_is_a_fault(in_tmp: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    as_stream(pa.table({"chosen": twice}))
    assert faults_of("a.arrow") == {0: "chosen with a value that Python cannot hold"}


def test_offsets_that_leave_the_memory_are_a_fault(in_tmp: Path) -> None:
    offsets = pa.py_buffer(b"".join(place.to_bytes(4, "little", signed=True) for place in (0, 1, -900_000, 2, 3)))
    broken = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"abc"))
    with pa.ipc.new_stream("a.arrow", pa.schema({"chosen": pa.string()})) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([broken], ["chosen"]))
    assert faults_of("a.arrow") == dict.fromkeys((1, 2), "chosen with a damaged value")


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize("damage", ["cut in half", "cut at the end", "empty", "text", "zeros", "a folder"])
def test_a_damaged_file_is_named_in_one_sentence(in_tmp: Path, name: str, damage: str) -> None:
    table = pa.table({"chosen": [str(number) * 50 for number in range(2000)]})
    WRITE[name](table, name)
    path = Path(name)
    whole = path.read_bytes()
    new = {
        "cut in half": whole[: len(whole) // 2], "cut at the end": whole[:-9], "empty": b"",
        "text": b"chosen,rejected\n" * 9, "zeros": whole[:4] + bytes(len(whole) - 14) + whole[-10:],
    }.get(damage, b"")  # fmt: skip
    path.write_bytes(new)
    files = resolve(name)
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError) as error:
        for file in files:
            for chunk in read_chunks(file, key=KEY):
                list(chunk.rows())
    sentence = str(error.value)
    assert sentence.startswith(name) and "\n" not in sentence
    assert "remove it from data.train_files" in sentence or "the file has no rows; remove it from" in sentence


@pytest.mark.parametrize("name", WRITE)
def test_a_file_without_rows_and_one_with_a_column_twice_are_named(in_tmp: Path, name: str) -> None:
    write_table = WRITE[name]
    write_table(pa.table({"chosen": pa.array([], pa.string())}), name)
    with pytest.raises(UserError, match=rf"^{name}: the file has no rows; remove it from data\.train_files"):
        rows_of(name)
    write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"]), name)
    with pytest.raises(UserError, match=rf"^{name}: duplicate column 'chosen'; rename one"):
        rows_of(name)


def test_the_first_version_of_feather_is_named(in_tmp: Path) -> None:
    Path("a.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(UserError, match=r"^a\.feather: Feather version 1 is not read; recreate it with a newer"):
        rows_of("a.feather")


@pytest.mark.parametrize("name", WRITE)
def test_flipped_bytes_end_in_a_sentence_or_in_rows(in_tmp: Path, name: str) -> None:
    table = pa.Table.from_pylist(
        [{"chosen": [{"role": "user", "content": "hi"}], "text": str(i) * 9} for i in range(40)]
    )
    WRITE[name](table, name)
    whole, rng = Path(name).read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        Path(name).write_bytes(damaged)
        try:
            for chunk in read_chunks(resolve(name)[0], key=KEY):
                list(pickle.loads(pickle.dumps(chunk)).rows())
        except UserError as error:
            assert str(error).startswith(name)


def chunks_of(name: str) -> list[Any]:
    return [chunk for file in resolve(name) for chunk in read_chunks(file, key=KEY)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "list.json", "a.csv", "stream.arrow", "a.feather"])
def test_a_chunk_gives_the_same_rows_after_being_pickled(in_tmp: Path, name: str) -> None:
    write(Path(name), PAIRS * 500, like=name)
    chunks = chunks_of(name)
    assert [chunk.first for chunk in chunks] == [sum(map(len, chunks[:place])) for place in range(len(chunks))]
    assert max(map(len, chunks)) <= 1024 and sum(map(len, chunks)) == 2500
    rows = [row for chunk in chunks for row in chunk.rows()]
    assert [row for chunk in chunks for row in pickle.loads(pickle.dumps(chunk)).rows()] == rows
    assert [row.values for row in rows] == PAIRS * 500
    assert [row.index for row in rows] == list(range(2500))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "list.json", "a.csv", "stream.arrow", "a.feather"])
@pytest.mark.slow
def test_chunks_of_long_rows_stay_small(in_tmp: Path, name: str) -> None:
    rows = [{"chosen": f"{number}" + "x" * 3_000_000, "rejected": "b"} for number in range(5)]
    write(Path(name), rows, like=name)
    chunks = chunks_of(name)
    assert max(map(len, chunks)) <= 3
    assert max(len(pickle.dumps(chunk)) for chunk in chunks) < 13_000_000
    assert [row.values for chunk in chunks for row in chunk.rows()] == rows


def test_a_long_row_group_is_not_held_in_memory(in_tmp: Path) -> None:
    text = random.Random(0).randbytes(16_000_000).hex()
    texts = [text[place : place + 4000] for place in range(0, len(text), 4000)]
    pq.write_table(pa.table({"chosen": texts}), "a.parquet", row_group_size=len(texts), compression="none")
    del text
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for chunk in read_chunks(resolve("a.parquet")[0], key=KEY):
        most, rows = max(most, pa.total_allocated_bytes() - before), rows + len(chunk)
    assert rows == len(texts)
    assert most < 16_000_000  # of 32 MB


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_chunk_of_a_long_batch_is_pickled_without_its_neighbours(in_tmp: Path, kind: Any) -> None:
    texts = pa.array([f"text number {number:060}" for number in range(20_000)])
    nested = pa.array([[{"content": text}] for text in texts.to_pylist()])
    as_stream(pa.table({"chosen": texts.cast(kind), "messages": nested}))
    sizes = [len(pickle.dumps(chunk)) for chunk in chunks_of("a.arrow")]
    assert len(sizes) == 20 and max(sizes) < 250_000
