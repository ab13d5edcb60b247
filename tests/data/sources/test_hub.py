"""Hub data sets, over real HTTP against a stand-in: what is chosen, downloaded and kept, and what is said when not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_gallery.data.sources import FileEntry, SourceConfig, hub, resolve_files
from rm_gallery.errors import UserError
from tests.data.sources.stand_in import TOKEN, Repository, StandIn, serving
from tests.data.sources.test_splits import HELPSTEER3_README, ONLY_TRAIN
from tests.data.sources.writing import KEY, PAIRS, lines, resolve, values_of, write

pytestmark = pytest.mark.slow

SHARDS = [f"data/train-0000{place}-of-00002-0123456789abcdef.parquet" for place in range(2)]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two files, which hold the first two and the other three pairs."""
    folder = tmp_path_factory.mktemp("parquet")
    return [write(folder / f"{place}.parquet", rows).read_bytes() for place, rows in enumerate((PAIRS[:2], PAIRS[2:]))]


@pytest.fixture
def site(in_tmp: Path, parquet: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in with `org/pairs`, laid out as hendrydong/preference_700K is; the cache is empty, nothing waits."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(in_tmp / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(in_tmp / "no_token"))
    monkeypatch.setattr(hub, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        files = {"README.md": b"# Pairs", ".gitattributes": b"", **dict(zip(SHARDS, parquet, strict=True))}
        old = {**files, SHARDS[1]: parquet[0]}
        state.repositories["org/pairs"] = Repository({"main": files, "v1": old, "refs/convert/parquet": {
            "default/train/0000.parquet": parquet[1], "default/test/0000.parquet": parquet[0]}})  # fmt: skip
        yield state


def refused(*paths: str, key: str = KEY, **options: str) -> str:
    """The sentence with which paths are refused, without the key and path that it begins with."""
    with pytest.raises(UserError) as error:
        resolve(*paths, key=key, **options)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{key}={paths[0]}: ")
    return sentence.removeprefix(f"{key}={paths[0]}: ")


@pytest.mark.parametrize(
    "path",
    ["org/pairs/train.parquet", "org/pairs", "org/pairs/data", "org/pairs/data/*.parquet", "org/pairs/**/*.parquet"],
)  # fmt: skip
def test_a_split_is_downloaded_and_read(site: StandIn, path: str) -> None:
    files = resolve(path)
    assert [file.name for file in files] == [f"org/pairs/{shard}" for shard in SHARDS]
    assert values_of(path) == PAIRS


def test_a_file_of_the_repository_is_read_as_that_file(site: StandIn) -> None:
    assert values_of(f"org/pairs/{SHARDS[1]}") == PAIRS[2:]


def test_a_second_start_asks_only_for_the_newest_commit(site: StandIn) -> None:
    first = resolve("org/pairs")
    site.asked.clear()
    assert resolve("org/pairs") == first
    assert site.asked == ["GET /api/datasets/org/pairs/revision/main"]


def test_a_revision_decides_the_content_and_the_identity(site: StandIn) -> None:
    assert values_of("org/pairs", revision="v1") == [*PAIRS[:2], *PAIRS[:2]]
    commit = site.repositories["org/pairs"].commit("v1")
    entry = FileEntry("org/pairs", revision=commit)
    by_commit = resolve_files(SourceConfig(entry, revision="main"), key=KEY)
    assert [file.identity for file in by_commit] == [file.identity for file in resolve("org/pairs", revision="v1")]
    assert {file.identity for file in by_commit}.isdisjoint(file.identity for file in resolve("org/pairs"))


def test_the_conversion_of_the_hub_is_a_revision(site: StandIn) -> None:
    assert values_of("org/pairs", revision="refs/convert/parquet") == PAIRS[2:]
    assert values_of("org/pairs/test.parquet", revision="refs/convert/parquet") == PAIRS[:2]


def test_subsets_come_from_the_readme(site: StandIn) -> None:
    import gzip

    files = {f"{subset}/{split}.jsonl.gz": gzip.compress(lines([{"from": f"{subset} {split}"}]))
             for subset in ("preference", "feedback") for split in ("train", "validation")}  # fmt: skip
    site.repositories["org/steer"] = Repository({"main": {"README.md": HELPSTEER3_README.encode(), **files}})
    assert values_of("org/steer") == [{"from": "preference train"}]
    assert values_of("org/steer", key="data.val_files") == [{"from": "preference validation"}]
    assert values_of("org/steer/feedback/train.parquet") == [{"from": "feedback train"}]
    entry = FileEntry("org/steer", subset="feedback", split="validation")
    assert [file.name for file in resolve_files(SourceConfig(entry), key=KEY)] == [
        "org/steer/feedback/validation.jsonl.gz"
    ]


@pytest.mark.parametrize(
    ("path", "options", "sentence"),
    [
        ("org/pairs/test.parquet", {"key": "data.val_files"},
         f"has no split 'test'; {ONLY_TRAIN}"),
        ("org/pairs", {"key": "data.val_files"}, "has no split 'validation' or 'test'; it has train. Name one of "),
        ("org/pairs", {"train_split": "dev"}, "has no split 'dev'; it has train. Name one of these as split, or "),
        ("org/pairs", {"revision": "v2"}, "org/pairs has no such revision; name a branch, a tag or a full commit hash"),
        ("org/pairs/data/nope.parquet", {}, "the repository has no such file or folder; it holds data/train-00000-of-"),
        ("org/pairs/nope", {}, "the repository has no such file or folder; it holds data/train-00000-of-00002-"),
        ("org/pairs/*.csv", {}, "no data file of the repository matches the pattern; it holds data/train-00000-of-"),
        ("org/pairs/README.md", {}, "files that end in .md are not read; rename or convert it so that it ends in "),
        ("org/nope", {}, "no local file or folder (working directory "),
        ("data/sub/train.parquet", {}, "no local file or folder (working directory "),
        ("org/two--dashes", {}, "org/two--dashes cannot be downloaded ("),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_with_what_is(
    site: StandIn, path: str, options: dict[str, str], sentence: str
) -> None:
    assert refused(path, **options).startswith(sentence)


@pytest.mark.parametrize("path", ["org/pairs/train.parquet", "org/pairs/data/*.parquet"])
def test_a_split_beside_a_path_that_says_it_is_refused(site: StandIn, path: str) -> None:
    with pytest.raises(UserError, match=r": split does not apply to such a path; remove it from the entry$"):
        resolve_files(SourceConfig(FileEntry(path, split="test")), key=KEY)


def test_a_repository_without_data_files_names_the_conversion(site: StandIn) -> None:
    site.repositories["org/images"] = Repository({"main": {"README.md": b"", "a.png": b"", "b.zip": b""}})
    assert refused("org/images") == (
        "the repository has no data file that can be read (it holds README.md, a.png, b.zip); try the revision "
        "refs/convert/parquet, which the hub keeps for many datasets"
    )
    site.repositories["org/empty"] = Repository({"main": {".gitattributes": b""}})
    assert refused("org/empty").startswith("the repository has no data file that can be read (it is empty); try")


def test_a_split_of_mixed_kinds_is_named(site: StandIn, parquet: list[bytes]) -> None:
    site.repositories["org/mixed"] = Repository({"main": {"train.parquet": parquet[0], "train.csv": b"a\n1\n"}})
    assert refused("org/mixed") == "holds CSV and parquet files; select one kind, e.g. org/mixed/**/*.csv"
    assert values_of("org/mixed/**/*.parquet") == PAIRS[:2]


def test_a_gated_data_set_needs_a_token(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    site.repositories["org/pairs"].access = "gated"
    sentence = (
        f"org/pairs is gated: accept its terms at {site.url}/datasets/org/pairs and set HF_TOKEN to a token of yours"
    )
    assert refused("org/pairs") == sentence
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert refused("org/pairs") == sentence
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert values_of("org/pairs") == PAIRS


def test_a_private_data_set_looks_like_none_without_a_token(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    site.repositories["org/pairs"].access = "private"
    assert f"{site.url} has no dataset org/pairs; correct the name, or set HF_TOKEN to" in refused("org/pairs")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert values_of("org/pairs") == PAIRS


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_download_goes_on_where_the_connection_broke_off(site: StandIn, cuts: int) -> None:
    site.cuts = cuts
    assert values_of("org/pairs") == PAIRS
    assert site.cuts == 0


def test_a_download_that_always_breaks_off_leaves_nothing_half_read(site: StandIn) -> None:
    assert len(resolve(f"org/pairs/{SHARDS[0]}")) == 1
    site.cuts = 10_000
    sentence = refused("org/pairs")
    assert sentence.startswith("org/pairs cannot be downloaded (") and sentence.endswith(
        "); run the same command again"
    )
    assert 10_000 - site.cuts < 60
    site.cuts = 0
    assert values_of("org/pairs") == PAIRS


def test_a_bad_moment_of_the_server_is_waited_out(site: StandIn) -> None:
    site.statuses = [503, 500]
    assert values_of("org/pairs") == PAIRS


def test_a_server_that_stays_away_is_named(site: StandIn) -> None:
    site.statuses = [503] * 10_000
    assert refused("org/pairs").startswith("no local file or folder (working directory ")


def test_without_a_network_the_cache_serves(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve("org/pairs")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/pairs") == resolve("org/pairs/train.parquet") == files
    assert values_of("org/pairs") == PAIRS
    assert refused("org/others").endswith("; check the path and the network")
    assert refused("org/pairs", revision="v1").endswith("; check the path and the network")
    shutil.rmtree(next(Path("cache").glob("**/snapshots/*/data")))
    assert "org/pairs is not complete in the cache while http://127.0.0.1:9 cannot be reached (" in refused("org/pairs")


NOT_CACHED = (
    "no local file or folder, and org/others is not complete in the cache while HF_HUB_OFFLINE is set; unset it"
)
OFFLINE = """
import sys
import threading
from rm_gallery.data.sources import SourceConfig, read_rows, resolve_files
for path in sys.argv[1:]:
    try:
        files = resolve_files(SourceConfig(path), key="data.train_files")
        print(len(list(read_rows(files, key="data.train_files"))))
    except ValueError as error:
        print(error)
"""


def test_offline_mode_reads_a_warm_cache_only(site: StandIn) -> None:
    resolve("org/pairs")
    site.asked.clear()
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "cache", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", OFFLINE, "org/pairs/train.parquet", "org/others"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines() == [
        "5",
        f"data.train_files=org/others: {NOT_CACHED}",
    ]
    assert site.asked == []


def test_a_full_disk_is_named(site: StandIn) -> None:
    Path("cache").write_text("a file where the cache should be")
    assert refused("org/pairs").startswith(f"org/pairs cannot be put into the cache {Path.cwd()}/cache (")


def test_a_hub_that_cannot_be_reached_is_asked_once(
    site: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.go_offline_if_unreachable()
    hub.go_offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE
    reason = "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused)"
    assert hub.why_offline() == reason
    assert [record.message for record in caplog.records] == [
        f"{reason}: only models and datasets in the cache are used"
    ]


def test_a_hub_behind_a_proxy_is_left_to_the_client(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")
    hub.go_offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE and not hub.why_offline()


def test_a_hub_that_does_not_answer_is_given_up_after_the_timeout(
    site: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        over.wait(10)
        raise OSError

    monkeypatch.setattr(hub, "_CONNECT_S", 0.05)
    monkeypatch.setattr(hub.socket, "create_connection", look_up)
    hub.go_offline_if_unreachable()
    over.set()
    assert hub.why_offline().endswith(" cannot be reached (no answer within 0.05 s)")
