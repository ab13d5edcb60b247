"""Lengths: a sample of the data, as tokens where there is a tokenizer, else by a stated ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.data.config import DataConfig, Side
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError
from rm_gallery.planning import lengths as planning_lengths
from rm_gallery.planning.lengths import assumed_lengths, group_chars, read_lengths, tokenizer_in
from rm_gallery.schema import Comparison, PreferenceGroup
from rm_gallery.training.data_setup import load_side
from tests.small import chat_pairs, text_pairs, write_pairs


def _read(path: Path, *, tokenizer: Path | None = None, **settings: Any) -> planning_lengths.Lengths:
    config = DataConfig(train_files=str(path), **settings)
    folder = None if tokenizer is None else str(tokenizer)
    return read_lengths(config, tokenizer_folder=folder, chars_per_token=4.0)


@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_with_a_tokenizer_the_lengths_are_those_of_training(
    make: Any, tmp_path: Path, tokenizer_folder: Path, tokenizer: Any
) -> None:
    path = write_pairs(tmp_path / "train.parquet", make(50))
    found = _read(path, tokenizer=tokenizer_folder)
    trained = load_side(Side("data.train_files"), DataConfig(train_files=str(path)), tokenizer).data
    assert found.sizes.tokens.tolist() == trained.sizes.tokens.tolist()
    assert found.num_pairs == 50
    assert found.longest_group == trained.sizes.tokens.max()
    assert found.how == f"50 rows, tokens of the tokenizer in {tokenizer_folder}"


def test_without_one_characters_count(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.parquet", [{"prompt": "q" * 40, "chosen": "a" * 80, "rejected": "b" * 20}])
    found = _read(path)
    assert found.sizes.tokens.tolist() == [10 + 20 + 5]
    assert found.sizes.longest_text.tolist() == [30]
    assert "4 characters a token assumed" in found.how


def test_shared_characters_count_once() -> None:
    group = PreferenceGroup("ask ", ["same one", "same two, longer"], (Comparison(0, 1),))
    assert group_chars(group) == [4 + 5, 3, 11]
    turns: list[Any] = [[{"role": "assistant", "content": text}] for text in ("yes", "yes!")]
    chat = PreferenceGroup([{"role": "user", "content": "ask"}], turns, (Comparison(0, 1),), "chat")
    assert group_chars(chat) == [6, 0, 1]


def test_rows_that_training_leaves_out_do_not_count(tmp_path: Path, tokenizer_folder: Path) -> None:
    long = {"chosen": "a" * 3000, "rejected": "b" * 3000}
    same = {"chosen": "a", "rejected": "a"}
    path = write_pairs(tmp_path / "a.parquet", [*text_pairs(6), long, same])
    assert _read(path, max_length=500).num_pairs == 6
    assert _read(path, max_length=500, tokenizer=tokenizer_folder).num_pairs == 6


def test_a_large_file_is_sampled_evenly_and_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_lengths, "_SAMPLE_ROWS", 100)
    rows = [Row({}, "a", index) for index in range(10_000)]
    kept, total = planning_lengths._sample(rows)
    places = [int(row.where[2:]) for row in kept]
    assert (len(set(places)), total) == (100, 10_000)
    assert places == sorted(places)
    assert np.mean(places) == pytest.approx(5000, abs=1000)  # three and a half standard deviations
    assert [row.where for row in planning_lengths._sample(rows)[0]] == [row.where for row in kept]


def test_a_sample_is_scaled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_lengths, "_SAMPLE_ROWS", 10)
    found = _read(write_pairs(tmp_path / "a.parquet", text_pairs(40)))
    assert (len(found.sizes), found.num_pairs) == (10, 40)
    assert found.how.startswith("a sample of 10 of 40 rows, ")


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([{"chosen": "a", "rejected": "a"}], {}, "none of 1 rows can be used: 1 chosen equal to rejected"),
        (
            [{"chosen": "a" * 99, "rejected": "b"}],
            {"max_length": 5},
            "none of 1 rows can be used: longer than data.max",
        ),
        ([{"chosen": "a", "lost": "b"}], {}, "no column 'rejected'"),
        ([{"chosen": 1, "rejected": 2}], {}, "holds int, not text or messages"),
    ],
)
def test_data_without_a_usable_row_are_refused(
    rows: list[dict[str, Any]], settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=problem):
        _read(path, **settings)


def test_assumed_pairs_are_all_alike() -> None:
    found = assumed_lengths(prompt=10, response=20, num_pairs=7, max_length=100)
    assert set(found.sizes.tokens.tolist()) == {50}
    assert set(found.sizes.longest_text.tolist()) == {30}
    assert (found.num_pairs, found.longest_group) == (7, 200)


def test_a_folder_with_a_tokenizer_is_told(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert tokenizer_in(str(tokenizer_folder)) == str(tokenizer_folder)
    assert tokenizer_in(str(tokenizer_folder / "tokenizer_config.json")) == str(tokenizer_folder)
    assert tokenizer_in(str(tmp_path)) is None
