"""Local files: which are read, in which order, and what is said about paths that name none."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.data.sources import (
    FileEntry,
    SourceConfig,
    count_rows,
    entries_of,
    find_files,
    read_rows,
    resolve_entries,
    resolve_files,
)
from rm_gallery.errors import UserError
from tests.data.sources.writing import KEY, PAIRS, WRITERS, lines, resolve, save_to_disk, values_of, write


def find(*paths: str, key: str = KEY) -> list[str]:
    found = [str(path) for path in find_files(paths, key=key)]
    assert found == [file.path for file in resolve(*paths, key=key)]
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(in_tmp: Path, name: str) -> None:
    write(Path(name), like=name)
    assert values_of(name) == PAIRS


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_kind_of_file_are_counted_and_can_be_skipped(in_tmp: Path, name: str) -> None:
    write(Path(name), like=name)
    [file] = resolve_entries(name, key="--input")
    assert count_rows(file, key="--input") == len(PAIRS)
    for start in range(len(PAIRS) + 2):
        rows = list(read_rows([file], key="--input", start=start))
        assert [row.values for row in rows] == PAIRS[start:]
        assert [row.index for row in rows] == list(range(start, len(PAIRS)))


def test_a_command_that_does_not_train_takes_every_split(in_tmp: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write(Path("set", name))
    for name in ("train", "test"):
        save_to_disk(Path("saved", name), PAIRS)
    Path("saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert [file.path for file in resolve_entries("set", key="--input")] == ["set/test.jsonl", "set/train.jsonl"]
    [test] = resolve_entries([FileEntry("set", split="test")], key="--input")
    assert test.path == "set/test.jsonl"
    assert len({Path(file.path).parent for file in resolve_entries("saved", key="--input")}) == 2


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("place", ["folder", "glob"])
def test_every_kind_of_file_is_found_in_a_folder(in_tmp: Path, name: str, place: str) -> None:
    write(Path("data", name), like=name)
    write(Path("data", f"b{name}"), like=name)
    assert find("data" if place == "folder" else "data/*") == sorted([f"data/{name}", f"data/b{name}"])


def test_a_folder_gives_its_files_sorted_by_name_and_no_others(in_tmp: Path) -> None:
    for name in ("b", "a", "c", ".hidden"):
        write(Path("data", f"{name}.parquet"))
    for name in ("notes.txt", "dataset_info.json", "LICENSE"):
        Path("data", name).write_text("{}")
    assert find("data") == ["data/a.parquet", "data/b.parquet", "data/c.parquet"]


def test_a_folder_without_files_of_its_own_gives_those_below(in_tmp: Path) -> None:
    write(Path("set/part.parquet/0.parquet"))
    write(Path("set/part.parquet/deep/1.parquet"))
    write(Path("set/.cache/2.parquet"))
    assert find("set") == ["set/part.parquet/0.parquet", "set/part.parquet/deep/1.parquet"]


def test_a_folder_with_splits_gives_the_one_that_fits(in_tmp: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(Path("set/data", f"{name}.parquet"))
    train = ["set/data/train-00000-of-00002.parquet", "set/data/train-00001-of-00002.parquet"]
    test = ["set/data/test-00000-of-00001.parquet"]
    for folder in ("set", "set/data"):
        assert find(folder) == train
        assert find(folder, key="data.val_files") == test
        assert [file.path for file in resolve(folder, train_split="test")] == test


def test_files_of_a_folder_that_are_not_read_are_a_warning(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("split/train.csv", "split/my_test.csv", "mixed/a.csv", "mixed/sub/b.csv", "kinds/a.jsonl.gz"):
        (in_tmp / name).parent.mkdir(parents=True, exist_ok=True)
        write(in_tmp / name, PAIRS, like="a.jsonl.gz" if name.endswith("gz") else "a.csv")
    caplog.set_level("WARNING")
    for name in ("README.md", "b.xlsx", "c.jsonl.bz2"):
        (in_tmp / "kinds" / name).touch()
    for name in ("split", "mixed", "kinds"):
        find_files(name, key=KEY)  # the check of a configuration, which does not warn
        resolve(name)
    assert [record.getMessage().partition("; convert")[0] for record in caplog.records] == [
        "data.train_files=split: reading train.csv, not my_test.csv; name a split to choose others",
        "data.train_files=mixed: files in subfolders are not read, e.g. sub/b.csv; move them, or name them with a glob",
        "data.train_files=kinds: not read: b.xlsx, c.jsonl.bz2",
    ]
    assert all(record.levelname == "WARNING" for record in caplog.records)
    caplog.clear()
    resolve("split", train_split="train")
    assert not [record for record in caplog.records if record.levelname == "WARNING"], "the split was named"


def test_an_entry_names_its_own_split(in_tmp: Path) -> None:
    for name in ("train", "dev"):
        write(Path("set", f"{name}.jsonl"))
    entry = FileEntry("set", split="validation")
    assert [str(path) for path in find_files([entry], key=KEY)] == ["set/dev.jsonl"]
    files = resolve_files(SourceConfig(("set", entry)), key=KEY)
    assert [(file.path, file.entry) for file in files] == [("set/train.jsonl", 0), ("set/dev.jsonl", 1)]


def test_a_glob_gives_sorted_files_and_a_list_keeps_its_order(in_tmp: Path) -> None:
    for name in ("b", "a", "other"):
        write(Path(f"{name}.parquet"))
    assert find("[ab].parquet") == ["a.parquet", "b.parquet"]
    assert find("other.parquet", "a.parquet") == ["other.parquet", "a.parquet"]
    assert [file.entry for file in resolve("other.parquet", "[ab].parquet")] == [0, 1, 1]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(in_tmp: Path) -> None:
    write(Path("a[1].parquet"))
    assert find("a[1].parquet") == ["a[1].parquet"]


@pytest.mark.parametrize("path", ["~/pairs.parquet", "file:/" + "/{}/pairs.parquet", "{}/pairs.parquet"])
def test_other_ways_to_write_a_path(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    write(Path("pairs.parquet"))
    assert find(path.format(in_tmp)) == [str(in_tmp / "pairs.parquet")]


def test_a_local_path_wins_over_a_hub_name(in_tmp: Path) -> None:
    write(Path("org/name/train.parquet"))
    assert find("org/name/train.parquet") == find("org/name") == ["org/name/train.parquet"]
    assert find("org/name/*.parquet") == ["org/name/train.parquet"]


def test_what_save_to_disk_wrote_is_read_by_its_list_of_files(in_tmp: Path) -> None:
    save_to_disk(Path("saved"), PAIRS[:2], PAIRS[2:])
    write(Path("saved/data-00000-of-00005.arrow"), like="stream.arrow")  # left over from an earlier save
    assert find("saved") == ["saved/data-00000-of-00002.arrow", "saved/data-00001-of-00002.arrow"]
    assert values_of("saved") == PAIRS


def test_a_saved_dict_of_splits_gives_the_one_that_fits(in_tmp: Path) -> None:
    save_to_disk(Path("saved/train"), PAIRS)
    save_to_disk(Path("saved/test"), PAIRS[:1])
    Path("saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert values_of("saved") == PAIRS
    assert values_of("saved", key="data.val_files") == PAIRS[:1]
    with pytest.raises(UserError, match=r"^data\.train_files=saved: has no split 'dev'; it has test, train\."):
        resolve("saved", train_split="dev")


def empty_folder() -> None:
    Path("set").mkdir()


def mixed_folder() -> None:
    write(Path("set/a.parquet"))
    write(Path("set/b.csv"))


def folder_without_train() -> None:
    write(Path("set/dev.csv"))
    write(Path("set/test.csv"))


def incomplete_save() -> None:
    save_to_disk(Path("set"), PAIRS, PAIRS)
    Path("set/data-00001-of-00002.arrow").unlink()


def empty_save() -> None:
    save_to_disk(Path("set"))


def damaged_save() -> None:
    empty_folder()
    Path("set/state.json").write_text('{"_data_files": [')


def other_state() -> None:
    empty_folder()
    Path("set/state.json").write_text('{"_data_files": [1]}')


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (empty_folder, "the folder has no data file (parquet, JSON lines, CSV, Arrow); name one that does"),
        (mixed_folder, "holds CSV and parquet files; select one kind, e.g. set/*.parquet"),
        (folder_without_train, "has no split 'train'; it has test, validation. Name one of these as split"),
        (incomplete_save, "data-00001-of-00002.arrow is missing from set; save or copy the dataset again"),
        (empty_save, "the saved dataset is empty; choose another"),
        (damaged_save, "state.json is damaged; save the dataset again"),
        (other_state, "set/state.json does not list the data files; save the dataset again"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named_with_what_to_do(in_tmp: Path, make: object, sentence: str) -> None:
    assert callable(make)
    make()
    for call in (lambda: find_files("set", key=KEY), lambda: resolve("set")):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == f"data.train_files=set: {sentence}"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nope.parquet", "data.train_files=nope.parquet: no such file or folder (working directory "),
        ("./org/set/train.parquet", "data.train_files=./org/set/train.parquet: no such file or folder (working "),
        ("no*.parquet", "data.train_files=no*.parquet: no file matches the pattern (working directory "),
        (" ", "data.train_files names an empty path; remove it or name a file"),
        ("x" * 300, "cannot be looked up (File name too long); choose another path"),
        ("a\0/*.parquet", "data.train_files='a\\x00/*.parquet': a path cannot contain a NUL character; remove it"),
        ("notes.txt", "data.train_files=notes.txt: files that end in .txt are not read; rename or convert it so that"),
        ("notes", "data.train_files=notes: the name does not tell what the file holds; rename or convert it so that"),
        ("a.parquet.gz", "data.train_files=a.parquet.gz: files that end in .parquet.gz are not read; rename or "),
        ("note*", "data.train_files=note*: matches only notes: the name does not tell what the file holds; rename"),
        ("pipe.jsonl", "data.train_files=pipe.jsonl: neither a file nor a folder; write the rows to a file and"),
    ],
)  # fmt: skip
def test_a_path_without_data_is_named_with_what_to_do(in_tmp: Path, path: str, sentence: str) -> None:
    for name in ("notes.txt", "notes", "a.parquet.gz"):
        Path(name).write_text("no data")
    os.mkfifo("pipe.jsonl")
    for call in (lambda: find_files(path, key=KEY), lambda: resolve(path)):
        with pytest.raises(UserError) as error:
            call()
        assert sentence in str(error.value)


def test_no_files_at_all_are_refused(in_tmp: Path) -> None:
    for files in ("", ()):
        with pytest.raises(UserError, match=r"^data\.train_files names no file; set it to a file, a folder, a hub"):
            find_files(files, key=KEY)


def test_a_file_that_is_named_twice_is_refused(in_tmp: Path) -> None:
    write(Path("data/a.parquet"))
    with pytest.raises(UserError, match=r"^data\.train_files: data/a\.parquet is listed twice; list it once, with a"):
        resolve("data", "data/a.parquet")


@pytest.mark.parametrize("name", ["split", "subset", "revision"])
def test_what_says_nothing_about_a_lone_file_is_refused(in_tmp: Path, name: str) -> None:
    write(Path("a.parquet"))
    for path in ("a.parquet", "*.parquet"):
        with pytest.raises(UserError, match=rf": {name} does not apply to such a path; remove it from the entry$"):
            find_files([FileEntry(path, **{name: "x"})], key=KEY)
    assert len(resolve("a.parquet", train_split="x", revision="x")) == 1  # meant for other entries


def test_json_that_describes_other_files_is_left_out(in_tmp: Path) -> None:
    write(Path("data/a.parquet"))
    Path("data/stats.json").write_text(json.dumps({"rows": 5}))
    assert find("data") == ["data/a.parquet"]


def test_the_identity_of_a_file_changes_with_its_content_only(in_tmp: Path) -> None:
    path = write(Path("a.jsonl"))
    before = resolve("a.jsonl")[0].identity
    assert resolve("a.jsonl")[0].identity == before
    content, stat = path.read_bytes(), path.stat()
    for changed in (content.replace(b"good 0", b"good 9"), content[:-30]):
        path.write_bytes(changed)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert resolve("a.jsonl")[0].identity != before
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert resolve("a.jsonl")[0].identity != before


def test_entries_are_counted_over_the_whole_key() -> None:
    config = SourceConfig(("a.parquet", FileEntry("b", weight=2.0)), FileEntry("c"))
    assert entries_of(config, KEY) == (FileEntry("a.parquet"), FileEntry("b", weight=2.0))
    assert entries_of(config, "data.val_files") == (FileEntry("c"),)
    assert entries_of(SourceConfig(), KEY) == ()


def test_an_edit_that_keeps_size_ends_and_modification_time_changes_the_identity(in_tmp: Path) -> None:
    path = in_tmp / "a.jsonl"
    path.write_bytes(lines([{"chosen": f"{number:9}", "rejected": "b"} for number in range(9000)]))
    before, facts = resolve("a.jsonl")[0].identity, path.stat()
    while True:  # the clock of a file system has ticks of up to 10 ms
        with path.open("r+b") as file:
            file.seek(facts.st_size // 2)
            file.write(b"edited")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        if path.stat().st_ctime_ns != facts.st_ctime_ns:
            break
    assert path.stat().st_size == facts.st_size and path.stat().st_mtime_ns == facts.st_mtime_ns
    assert resolve("a.jsonl")[0].identity != before


@pytest.mark.parametrize("change", ["grown", "shrunk", "replaced", "edited"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_a_file_that_changes_while_it_is_read_is_refused(in_tmp: Path, name: str, change: str) -> None:
    path = write(in_tmp / name, PAIRS, like="stream.arrow" if name == "a.arrow" else "")
    [file] = resolve(name)
    content = path.read_bytes()
    rows = read_rows([file], key=KEY)
    next(rows)
    if change == "replaced":
        (in_tmp / "new").write_bytes(content)
        os.replace("new", path)
    else:
        path.write_bytes({"grown": content + content, "shrunk": content[:-9], "edited": content}[change])
        os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=rf"^{name}.*changed during this run.*remove it from data\.train_files$"):
        list(rows)


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(in_tmp: Path) -> None:
    path = write(in_tmp / "a.jsonl")
    rows = read_rows(resolve("a.jsonl"), key=KEY)
    next(rows)
    path.unlink()
    assert len(list(rows)) == len(PAIRS) - 1


def test_what_is_no_regular_file_is_skipped_with_a_warning(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = in_tmp / "data"
    write(data / "a.jsonl")
    os.mkfifo(data / "pipe.jsonl")
    (data / "folder.jsonl").mkdir()
    (data / "gone.jsonl").symlink_to("nowhere")
    (data / "loop.jsonl").symlink_to("loop.jsonl")
    (data / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(data / "notes")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("data/socket.jsonl")
        for path in ("data", "data/*"):
            caplog.clear()
            assert [file.path for file in resolve(path)] == ["data/a.jsonl"]
            assert (
                "skipped " in caplog.text
                and " and 3 more: not a regular file" in caplog.text
                and "notes" not in caplog.text
            )
    (data / "a.jsonl").unlink()
    for name in ("zero.jsonl", "folder.jsonl", "socket.jsonl", "loop.jsonl"):
        (data / name).rmdir() if name == "folder.jsonl" else (data / name).unlink()
    caplog.clear()
    with pytest.raises(UserError, match=r"^data\.train_files=data: the folder has no data file"):
        resolve("data")
    assert "gone.jsonl (a broken symbolic link)" in caplog.text and "pipe.jsonl (a named pipe)" in caplog.text
    with pytest.raises(
        UserError, match=r"^data\.train_files=data/gone\.jsonl: a broken symbolic link \(to nowhere\); "
    ):
        resolve("data/gone.jsonl")


def test_folders_that_symbolic_links_repeat_are_read_once(in_tmp: Path) -> None:
    write(in_tmp / "elsewhere/b.jsonl")
    write(in_tmp / "data/part/a.jsonl")
    (in_tmp / "data/part/loop").symlink_to(in_tmp / "data")
    (in_tmp / "data/linked").symlink_to(in_tmp / "elsewhere")
    assert sorted(find("data")) == ["data/linked/b.jsonl", "data/part/a.jsonl"]
    assert sorted(find("data/**/*.jsonl")) == ["data/linked/b.jsonl", "data/part/a.jsonl"]


def test_a_folder_that_cannot_be_listed_is_refused(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(in_tmp / "data/part/a.jsonl")
    (in_tmp / "data/secret").mkdir()
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"^data\.train_files=data: cannot be looked up \(Permission denied\)"):
        resolve("data")


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_above_the_limit_is_dropped_in_every_kind_of_file(in_tmp: Path, name: str) -> None:
    """The sizes of the other rows, the place of the large one and its column decide nothing."""
    small, large = {"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "word " * 400}
    rows = [large, small, small, large, large, *[small] * 100, large]
    write(Path(name), rows, like=name)
    [file] = resolve(name, max_row_bytes=1000)
    assert count_rows(file, key=KEY) == len(rows)
    for start in (0, 1, 4, 50):
        found = list(read_rows([file], key=KEY, start=start))
        assert [row.index for row in found] == list(range(start, len(rows)))
        assert [row.values for row in found] == [{} if row is large else row for row in rows[start:]]
        faults = {row.fault for row in found}
        assert faults == {"", "row larger than data.max_row_bytes=1000"}
    assert values_of(name, max_row_bytes=4000) == rows


def test_a_dictionary_does_not_multiply_a_large_value(in_tmp: Path) -> None:
    import pyarrow as pa

    large = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 1_000_000]))
    table = pa.table({"chosen": large})
    with pa.ipc.new_file("a.arrow", table.schema) as writer:
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    for row in read_rows(resolve("a.arrow", max_row_bytes=100_000), key=KEY):
        assert row.fault and pa.total_allocated_bytes() - before < 20_000_000
    for row in read_rows(resolve("a.arrow"), key=KEY):
        assert len(row.values["chosen"]) == 1_000_000 and pa.total_allocated_bytes() - before < 30_000_000


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_mapped_file_that_is_truncated_while_it_is_read_is_refused(in_tmp: Path, kind: str) -> None:
    """Reading what is no longer there would end the process."""
    import pyarrow as pa

    table = pa.table({"chosen": ["x" * 1000] * 3000, "rejected": ["b"] * 3000})
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)("a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    rows = read_rows(resolve("a.arrow"), key=KEY)
    next(rows)
    os.truncate("a.arrow", 1_200_000)
    with pytest.raises(UserError, match=r"^a\.arrow:1000: .*changed during this run"):
        list(rows)
