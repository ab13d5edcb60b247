"""The sample of an estimate: tokens if there is a tokenizer, else runs of characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.data.config import DataConfig, Side
from rm_gallery.data.sources import FileEntry
from rm_gallery.errors import UserError
from rm_gallery.planning import sample as planning_sample
from rm_gallery.planning.sample import assumed_sample, read_sample, tokenizer_in
from rm_gallery.training.data_setup import load_side
from tests.small import chat_pairs, text_pairs, write_pairs


def _read(path: Path, *, tokenizer: Path | None = None, **settings: Any) -> planning_sample.Sample:
    config = DataConfig(train_files=str(path), **settings)
    folder = None if tokenizer is None else str(tokenizer)
    return read_sample(config, tokenizer_folder=folder, chars_per_token=4.0)


@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_with_a_tokenizer_the_lengths_are_those_of_training(
    make: Any, tmp_path: Path, tokenizer_folder: Path, tokenizer: Any
) -> None:
    path = write_pairs(tmp_path / "train.parquet", make(50))
    found = _read(path, tokenizer=tokenizer_folder)
    trained = load_side(Side("data.train_files"), DataConfig(train_files=str(path)), tokenizer).data
    assert found.data.fingerprint() == trained.fingerprint()
    assert (found.data.prompt_hashes == trained.prompt_hashes).all()
    assert found.num_pairs == 50
    assert found.longest_group == trained.sizes.tokens.max()
    assert found.how == f"50 rows, tokens of the tokenizer in {tokenizer_folder}"


def test_without_one_characters_count(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.parquet", [{"prompt": "q" * 40, "chosen": "a" * 80, "rejected": "b" * 20}])
    found = _read(path)
    assert found.data.sizes.tokens.tolist() == [10 + 20 + 5]
    assert found.data.sizes.longest_text.tolist() == [30]
    assert "4 characters per token assumed" in found.how


def test_characters_that_texts_begin_with_are_shared(tmp_path: Path) -> None:
    rows = [{"prompt": "question", "chosen": "same one, longer!", "rejected": "same two"}]
    [group] = [_read(write_pairs(tmp_path / "a.parquet", rows)).data[0]]
    assert [len(group.prefix), *map(len, group.tails)] == [3, 3, 1]  # "ques", "tion", "same"; " one", ...; " two"


def test_rows_that_training_leaves_out_do_not_count(tmp_path: Path, tokenizer_folder: Path) -> None:
    long = {"chosen": "a" * 3000, "rejected": "b" * 3000}
    same = {"chosen": "a", "rejected": "a"}
    path = write_pairs(tmp_path / "a.parquet", [*text_pairs(6), long, same])
    assert _read(path, max_length=500).num_pairs == 6
    assert _read(path, max_length=500, tokenizer=tokenizer_folder).num_pairs == 6


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}])
def test_a_large_file_is_sampled_uniformly_with_a_fixed_seed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_sample, "_MAX_ROWS", 160)
    path = write_pairs(tmp_path / "a.parquet", text_pairs(2000))
    found = _read(path, **settings)
    places = [int(found.data.where(number).rpartition(":")[2]) for number in range(len(found.data))]
    assert len(set(places)) == 160
    assert places == sorted(places)
    assert np.mean(places) == pytest.approx(1000, abs=200 if not settings else 650)  # three and a half deviations
    assert found.num_pairs == 2000
    steps = np.diff(places)
    assert (steps == 1).mean() == pytest.approx(15 / 16, abs=0.02) if settings else (steps == 1).mean() < 0.3
    assert _read(path, **settings).data.fingerprint() == found.data.fingerprint()


def test_entries_count_as_often_as_they_are_used(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pairs(tmp_path / f"{name}.parquet", text_pairs(10))
    files = (FileEntry(str(tmp_path / "a.parquet"), weight=3), FileEntry(str(tmp_path / "b.parquet"), weight=0.5))
    found = read_sample(DataConfig(train_files=files), tokenizer_folder=None, chars_per_token=4.0)
    assert (len(found.data), found.num_pairs) == (20, 35)


def test_a_sample_is_scaled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_sample, "_MAX_ROWS", 10)
    found = _read(write_pairs(tmp_path / "a.parquet", text_pairs(40)))
    assert (len(found.data), found.num_pairs) == (10, 40)
    assert found.how.startswith("a sample of 10 of 40 rows, ")


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([{"chosen": "a", "rejected": "a"}], {}, "none of 1 rows can be used: 1 chosen equal to rejected"),
        (
            [{"chosen": "a" * 99, "rejected": "b"}],
            {"max_length": 5},
            "none of 1 rows can be used: 1 longer than data.max",
        ),
        ([{"chosen": "a text", "lost": "another text"}], {}, "no column 'rejected'"),
        ([{"chosen": 1, "rejected": 2}], {}, "contains int, not text or messages"),
    ],
)
def test_data_without_a_usable_row_are_refused(
    rows: list[dict[str, Any]], settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=problem):
        _read(path, **settings)


def test_assumed_pairs_are_all_alike() -> None:
    found = assumed_sample(prompt=10, response=20, num_pairs=7, max_length=100)
    assert set(found.data.sizes.tokens.tolist()) == {50}
    assert set(found.data.sizes.longest_text.tolist()) == {30}
    assert (found.num_pairs, found.longest_group) == (7, 200)


def test_a_folder_with_a_tokenizer_is_told(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert tokenizer_in(str(tokenizer_folder)) == str(tokenizer_folder)
    assert tokenizer_in(str(tokenizer_folder / "tokenizer_config.json")) == str(tokenizer_folder)
    assert tokenizer_in(str(tmp_path)) is None
