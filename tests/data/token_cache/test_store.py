"""The token store: complete or not there, and the same data as in memory however it was cut into chunks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rm_gallery.data.token_cache import store as module
from rm_gallery.data.token_cache.arrays import ARRAYS, STARTS, TokenData, make_chunk
from rm_gallery.data.token_cache.store import DamagedStore, Facts, Store, StoreWriter, open_store
from rm_gallery.data.tokenization.token_group import Origin, Span, TokenGroup
from rm_gallery.errors import Dropped, UserError
from rm_gallery.schema import Comparison, Rating
from tests.small import random_groups

FACTS = Facts(style="chat", has_text_prompts=False, formats=["read as pairs: columns"], num_rows=30, held_out=2)


def groups_with_origins() -> list[tuple[TokenGroup, Origin]]:
    """Groups of three files and two sources, some with metadata, margins and soft labels."""
    found = []
    for number, group in enumerate(group for seed in range(3) for group in random_groups(seed)):
        comparisons = [
            Comparison(
                each.better, each.worse, 0.5 * number, margin=number or None, p_better=0.75 if number % 2 else None
            )
            for each in group.comparisons
        ]
        metadata = {"ground_truth": f"\u00e9{number}"} if number % 3 else {}
        origin = Origin(f"{number % 3}.parquet", number, "ab"[number % 2], 2**64 - 1 - number, metadata)
        ratings = [Rating(0, score=number, attributes=(0.5, number))]
        found.append((TokenGroup(group.prefix, group.tails, comparisons, ratings, [Span(0, 1, 2 + number)]), origin))
    return found


def write(folder: Path, chunk_size: int) -> Store:
    found = groups_with_origins()
    with StoreWriter(folder) as writer:
        for start in range(0, len(found), chunk_size):
            writer.append(make_chunk(found[start : start + chunk_size]))
        writer.finish(FACTS, Dropped({"null chosen": 3}, {"null chosen": "a:1"}))
    store = open_store(folder)
    assert store is not None
    return store


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_what_was_written_comes_back(tmp_path: Path, chunk_size: int) -> None:
    store, found = write(tmp_path / "s", chunk_size), groups_with_origins()
    in_memory = TokenData.from_groups(found)
    assert store.facts == FACTS
    assert store.dropped.describe() == "3 null chosen (first: a:1)"
    assert len(store.data) == len(in_memory) == len(found)
    for index, (group, origin) in enumerate(found):
        for data in (store.data, in_memory):
            back = data[index]
            assert back.prefix.tolist() == group.prefix.tolist()
            assert [tail.tolist() for tail in back.tails] == [tail.tolist() for tail in group.tails]
            assert list(back.comparisons) == list(group.comparisons)
            assert data.where(index) == f"{origin.file}:{origin.row}"
            assert data.metadata(index) == origin.metadata
            assert data.sources[data.source_numbers[index]] == origin.source
            assert int(data.prompt_hashes[index]) == origin.prompt_hash
    for name in ("tokens", "longest_text", "num_responses", "num_comparisons"):
        assert getattr(store.data.sizes, name).tolist() == getattr(in_memory.sizes, name).tolist()
    assert store.data.fingerprint() == in_memory.fingerprint()
    assert store.data.labels() == ["margin", "p_better", "score"]


def test_an_empty_store_can_be_opened(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.finish(FACTS, Dropped())
    store = open_store(tmp_path / "s")
    assert store is not None and len(store.data) == 0


def test_nothing_is_there_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s") as writer:
        writer.append(make_chunk(groups_with_origins()))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert open_store(tmp_path / "s") is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "s.tmp-1").mkdir()
    (tmp_path / "s.tmp-1" / "tokens.bin").write_bytes(b"half")
    write(tmp_path / "s", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


FILES = [*(f"{name}.bin" for name in (*ARRAYS, *STARTS)), "store.json"]


def flip(file: Path) -> None:
    """One bit, in a new file: a running process may have the old one mapped."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_store_with_one_flipped_bit_is_damaged(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", 10)
    flip(tmp_path / "s" / name)
    with pytest.raises(DamagedStore, match=rf"^{name} is not what was written$"):
        open_store(tmp_path / "s")
    assert len(write(tmp_path / "s", 10).data) == len(groups_with_origins()), "written again in its place"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
def test_a_store_that_lacks_a_part_is_damaged(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", 10)
    file = tmp_path / "s" / name
    content = file.read_bytes()
    for kept in (content[:-4], content + b"0000", b"", None):
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        with pytest.raises(DamagedStore, match=rf"^{name}"):
            open_store(tmp_path / "s")


@pytest.mark.parametrize(
    ("old", "new"),
    [("null chosen", "null"),
     ('"num_rows": 30', '"num_rows": 31'), ('"style"', '"stile"'), ('["a", "b"]', '["b", "a"]'),
     ('"record": {', '"record": [{')],
)  # fmt: skip
def test_an_edited_record_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    write(tmp_path / "s", 10)
    record = tmp_path / "s" / "store.json"
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(DamagedStore, match=r"^store\.json is not what was written$"):
        open_store(tmp_path / "s")


def test_files_of_the_same_size_that_change_places_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "s", 10)
    write(tmp_path / "t", 10)
    better, worse = tmp_path / "s/better.bin", tmp_path / "s/worse.bin"
    better.rename(tmp_path / "swap")
    worse.rename(better)
    (tmp_path / "swap").rename(worse)
    with pytest.raises(DamagedStore, match=r"^better\.bin is not what was written$"):
        open_store(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "t").rename(tmp_path / "s")
    with pytest.raises(DamagedStore, match=r"^it holds the tokens of t$"):
        open_store(tmp_path / "s")


@pytest.mark.slow
def test_every_block_of_a_large_file_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 100)
    for chunk_size in (1, 4, 100):
        write(tmp_path / "s", chunk_size)
        size = (tmp_path / "s" / "tokens.bin").stat().st_size
        assert size > 1000 and size % 100
    tokens = tmp_path / "s" / "tokens.bin"
    intact = tokens.read_bytes()
    for place in (*range(0, size, 100), size - 1):
        tokens.unlink()
        tokens.write_bytes(intact[:place] + bytes([intact[place] ^ 128]) + intact[place + 1 :])
        with pytest.raises(DamagedStore, match=r"^tokens\.bin is not what was written$"):
            open_store(tmp_path / "s")


@pytest.mark.parametrize("name", ["tokens", "tail", "prefix", "weight", "better", "token_start", "checksum"])
def test_damage_to_a_file_that_is_mapped_stops_the_run_that_uses_it(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "s", 10).data
    file = tmp_path / "s" / f"{name}.bin"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"^group \d+ of the token cache changed during this run"):
        for index in range(len(data)):
            data[index]


def test_arrays_are_mapped_from_the_files_and_cannot_be_changed(tmp_path: Path) -> None:
    store = write(tmp_path / "s", 10)
    with pytest.raises(ValueError, match="read-only"):
        store.data.tokens[0] = 1
    assert isinstance(store.data.tokens.base, np.memmap)


def test_a_record_that_is_a_named_pipe_is_damage(tmp_path: Path) -> None:
    write(tmp_path / "s", 10)
    (tmp_path / "s/store.json").unlink()
    os.mkfifo(tmp_path / "s/store.json")
    with pytest.raises(DamagedStore, match=r"^store\.json is missing$"):
        open_store(tmp_path / "s")
