"""The token store: complete or not there, and the same data as in memory however it was cut into chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rm_gallery.data.token_cache.arrays import TokenData, make_chunk
from rm_gallery.data.token_cache.store import Facts, Store, StoreWriter, open_store
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup
from rm_gallery.errors import Dropped
from rm_gallery.schema import Comparison
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
        found.append((TokenGroup(group.prefix, group.tails, comparisons), origin))
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
    assert store.data.unused_labels() == ["margins", "soft labels"]


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


@pytest.mark.parametrize("damage", ["cut", "missing", "no record", "half a record", "other version"])
def test_a_store_that_lacks_a_part_is_not_opened(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "s"
    write(folder, 10)
    record = folder / "store.json"
    if damage == "cut":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-4])
    elif damage == "missing":
        (folder / "row.bin").unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "half a record":
        record.write_text(record.read_text()[:-10])
    else:
        record.write_text(record.read_text().replace('"style"', '"stile"'))
    assert open_store(folder) is None
    assert len(write(folder, 10).data) == len(groups_with_origins()), "written again in its place"


def test_arrays_are_mapped_from_the_files_and_cannot_be_changed(tmp_path: Path) -> None:
    store = write(tmp_path / "s", 10)
    with pytest.raises(ValueError, match="read-only"):
        store.data.tokens[0] = 1
    assert isinstance(store.data.tokens.base, np.memmap)
