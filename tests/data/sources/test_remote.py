"""URLs through fsspec: every kind of file over HTTP, hub data sets as hf://, folders and globs, and what breaks."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from rm_gallery.data.sources import FileEntry, SourceConfig, read_rows, remote, resolve_files
from rm_gallery.data.sources.resolve import resolve_entries
from rm_gallery.errors import UserError
from tests.data.sources.stand_in import TOKEN, Repository, StandIn, serving
from tests.data.sources.writing import KEY, PAIRS, WRITERS, lines, resolve, rows_of, values_of, write


@pytest.fixture
def site(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for servers and for the hub; nothing waits, and no file system remembers what it listed."""
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(in_tmp / "no_token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    HfFileSystem.clear_instance_cache()
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        yield state


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The file system in memory, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def refused(path: str, **options: str) -> str:
    with pytest.raises(UserError) as error:
        rows_of(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("has_parts", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read_over_http(site: StandIn, name: str, has_parts: bool) -> None:
    site.files[f"/files/{name}"] = write(Path(name), like=name).read_bytes()
    site.has_parts = has_parts
    assert values_of(f"{site.url}/files/{name}") == PAIRS


@pytest.mark.parametrize("has_parts", [True, False])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl", "a.csv", "file.arrow"])
def test_reading_goes_on_where_the_connection_broke_off(site: StandIn, name: str, has_parts: bool) -> None:
    site.files[f"/files/{name}"] = write(Path(name), PAIRS * 50, like=name).read_bytes()
    site.has_parts = has_parts
    files = resolve(f"{site.url}/files/{name}")
    site.cuts = 3
    assert [row.values for row in read_rows(files, key=KEY)] == PAIRS * 50
    assert site.cuts == 0
    site.cuts = 10_000
    with pytest.raises(UserError, match=rf"^{site.url}/files/{name}: cannot be read further \("):
        list(read_rows(files, key=KEY))
    assert 10_000 - site.cuts < 10


def test_a_bad_moment_of_the_server_is_waited_out(site: StandIn) -> None:
    site.files["/files/a.jsonl"] = lines(PAIRS)
    site.statuses = [503, 502, 503]  # a look-up asks twice by itself
    assert values_of(f"{site.url}/files/a.jsonl") == PAIRS
    assert site.statuses == []
    site.statuses = [503] * 10_000
    assert "cannot be looked up (503, message=" in refused(f"{site.url}/files/a.jsonl")
    assert len(site.statuses) > 9_980


def test_the_query_of_a_url_is_no_part_of_its_name(site: StandIn) -> None:
    site.files["/files/a.jsonl.gz"] = gzip.compress(lines(PAIRS))
    rows = rows_of(f"{site.url}/files/a.jsonl.gz?key=secret")
    assert [row.values for row in rows] == PAIRS
    assert rows[3].where == f"{site.url}/files/a.jsonl.gz:3"
    assert "secret" not in refused(f"{site.url}/files/nope.jsonl?key=secret")


def test_the_identity_of_a_url_changes_with_its_content(site: StandIn) -> None:
    url = f"{site.url}/files/a.jsonl"
    site.files["/files/a.jsonl"] = lines(PAIRS)
    before = resolve(url)[0].identity
    assert resolve(url)[0].identity == before
    site.files["/files/a.jsonl"] = lines([*PAIRS[1:], PAIRS[0]])
    assert resolve(url)[0].identity != before


@pytest.mark.parametrize(
    "path", ["hf://datasets/org/pairs/data/train-0.jsonl", "hf://datasets/org/pairs/data/*.jsonl",
             "hf://datasets/org/pairs/data", "hf://datasets/org/pairs", "hf://datasets/org/pairs@v1"]
)  # fmt: skip
def test_a_hub_data_set_is_read_through_its_file_system(site: StandIn, path: str) -> None:
    train, other = {"data/train-0.jsonl": lines(PAIRS)}, {"README.md": b"", "other/test.csv": b"a\n1\n"}
    site.repositories["org/pairs"] = Repository({"main": {**train, **other}, "v1": {**train, "x": b""}})
    assert values_of(path) == PAIRS


def test_a_hub_data_set_that_cannot_be_read_is_named(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    site.repositories["org/pairs"] = Repository({"main": {"a.jsonl": lines(PAIRS)}}, "gated")
    url = "hf://datasets/org/pairs/a.jsonl"
    sentence = f"org/pairs is gated: accept its terms at {site.url}/datasets/org/pairs and set HF_TOKEN to a token of"
    assert sentence in refused(url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert values_of(url) == PAIRS
    assert refused("hf://datasets/org/nope/a.jsonl").startswith(
        "data.train_files=hf://datasets/org/nope/a.jsonl: no local file or folder (working directory "
    )
    assert "no such file" in refused("hf://datasets/org/pairs/b.jsonl")


def test_folders_and_globs_of_a_file_system(site: StandIn, memory: fsspec.AbstractFileSystem) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", ".hidden.jsonl", "notes.txt"):
        memory.pipe(f"/set/{name}", lines(PAIRS[:1]))
    train = ["memory:///set/train-0.jsonl", "memory:///set/train-1.jsonl"]
    assert [file.name for file in resolve("memory://set")] == train
    assert [file.name for file in resolve("memory://set/train*")] == train
    assert [file.name for file in resolve("memory://set", key="data.val_files")] == ["memory:///set/test.jsonl"]
    assert values_of("memory://set") == [PAIRS[0]] * 2


def test_folders_and_globs_of_a_page_with_links(site: StandIn) -> None:
    names = ["train-0.jsonl", "train-1.jsonl", "test.jsonl"]
    site.files["/files/"] = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
    for name in names:
        site.files[f"/files/{name}"] = lines(PAIRS)
    train = [f"{site.url}/files/{name}" for name in names[:2]]
    assert [file.path for file in resolve(f"{site.url}/files/")] == train
    assert [file.path for file in resolve(f"{site.url}/files/tr*.jsonl")] == train


@pytest.mark.parametrize("name", ["split", "subset", "revision"])
def test_what_says_nothing_about_a_url_is_refused(site: StandIn, name: str) -> None:
    site.files["/files/a.jsonl"] = lines(PAIRS)
    entry = FileEntry(f"{site.url}/files/a.jsonl", **{name: "x"})
    with pytest.raises(UserError, match=rf": {name} does not apply to such a path; remove it from the entry$"):
        resolve_files(SourceConfig(entry), key=KEY)


def test_a_file_of_an_archive_is_read(site: StandIn) -> None:
    import zipfile

    with zipfile.ZipFile("pairs.zip", "w") as archive:
        archive.writestr("data/a.jsonl", lines(PAIRS))
    site.files["/files/pairs.zip"] = Path("pairs.zip").read_bytes()
    assert values_of(f"zip://data/a.jsonl::{site.url}/files/pairs.zip") == PAIRS


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{}/files/nope.jsonl", "data.train_files={}/files/nope.jsonl: cannot be looked up (404, message='Not Found'"),
        ("http://127.0.0.1:9/a.jsonl", "data.train_files=http://127.0.0.1:9/a.jsonl: cannot be looked up (Cannot "),
        ("{}/files/a", "data.train_files={}/files/a: the name does not tell what the file holds; rename or convert"),
        ("memory://nope.jsonl", "data.train_files=memory://nope.jsonl: no such file; check the URL"),
        ("memory://nope*.jsonl", "data.train_files=memory://nope*.jsonl: no data file there; name a file, a folder "),
        ("gs://bucket/a.jsonl", "data.train_files=gs://bucket/a.jsonl: gs:// needs the package gcsfs; run "),
        ("nope://a.jsonl", "data.train_files=nope://a.jsonl: nope:// cannot be opened (Protocol not known: nope); "),
        ("smb://host/a.jsonl", "data.train_files=smb://host/a.jsonl: smb:// needs a package that is not installed ("),
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_read_is_named_with_what_to_do(
    site: StandIn, memory: fsspec.AbstractFileSystem, path: str, sentence: str
) -> None:
    assert refused(path.format(site.url)).startswith(sentence.format(site.url))


def test_a_package_of_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert refused("s3://bucket/a.jsonl") == (
        "data.train_files=s3://bucket/a.jsonl: s3:// needs the package s3fs; run pip install 'rm-gallery[remote]'"
    )


def test_a_damaged_remote_file_is_named_as_a_local_one(site: StandIn) -> None:
    whole = gzip.compress(lines(PAIRS))
    site.files["/files/a.jsonl.gz"] = whole[: len(whole) // 2]
    url = f"{site.url}/files/a.jsonl.gz"
    assert refused(url).startswith(
        f"{url}: cannot be read as JSON lines in .gz (Truncated compressed stream); recreate it"
    )
    site.files["/files/a.parquet"] = b"PAR1 and no more"
    assert refused(f"{site.url}/files/a.parquet").startswith(f"{site.url}/files/a.parquet: cannot be read as parquet (")


@pytest.mark.parametrize("url", ["zip://*.csv::http://user:pw-word@127.0.0.1:9/a.zip?sig=sig-nature",
                                 "http://user:pw-word@127.0.0.1:9/a.parquet?token=sig-nature"])  # fmt: skip
def test_no_message_and_no_cause_holds_the_credentials_of_a_url(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    with pytest.raises(UserError) as refused:
        resolve_entries([url], key="--input")
    messages, error = [caplog.text], refused.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert not re.search("pw-word|sig-nature", " ".join(messages))
