"""The keys that say where data lie: entries in every form, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rm_gallery.config import build
from rm_gallery.data.sources import FileEntry, entries_of, entry_problems
from rm_gallery.errors import UserError
from rm_gallery.training.config import TrainConfig, normalize, problems_of_training
from tests.data.sources.writing import KEY, write

KEYS = ("path", "weight", "split", "subset", "revision", "name", "format")


def build_config(values: dict[str, Any]) -> TrainConfig:
    return build(TrainConfig, values, prepare=normalize, check=problems_of_training)


def check(data: dict[str, Any]) -> Any:
    return build_config({"model": {"partial_pretrain": "org/model"}, "data": data})


def test_entries_are_paths_or_sections_of_keys(in_tmp: Path) -> None:
    for name in ("a", "b"):
        write(Path(f"{name}.parquet"))
    section = {"path": "b.parquet", "weight": 0.5, "name": "mine", "format": "pairs"}
    config = check({"train_files": ["a.parquet", section, {"path": "org/set", "split": "train", "revision": "v1"}]})
    assert entries_of(config.data, KEY) == (
        FileEntry("a.parquet"), FileEntry("b.parquet", weight=0.5, name="mine", format="pairs"),
        FileEntry("org/set", split="train", revision="v1"),
    )  # fmt: skip
    assert build_config(config.as_dict()) == config  # as config.yaml of the run folder is read back
    assert check({"train_files": section}).data.train_files == entries_of(config.data, KEY)[1]


@pytest.mark.parametrize(
    ("value", "sentences"),
    [
        (5, ["data.train_files=5: must be a path, a list of paths, or entries such as {path: a.parquet, weight: 2}"]),
        ([1], ["data.train_files[0]=1: must be a path or an entry such as {path: a.parquet}"]),
        ({"path": "a", "wieght": 2},
         [f"data.train_files.wieght: unknown key. Did you mean 'weight'? Known are {', '.join(KEYS)}"]),
        ([{"weight": 1}], ["data.train_files[0]: an entry needs its path, e.g. {path: a.parquet, weight: 2}"]),
        ([{"path": " "}], ["data.train_files[0]: an entry needs its path, e.g. {path: a.parquet, weight: 2}"]),
        ([{"path": "a", "split": 1}], ["data.train_files[0].split=1: must be a string; put quotes around it"]),
        *[([{"path": "a", "weight": weight}],
           [f"data.train_files[0].weight={weight!r}: must be a number above 0; remove the entry to use none of it"])
          for weight in (0, -1, float("nan"), float("inf"), "2", True, None, [1])],
    ],
)  # fmt: skip
def test_wrong_entries_are_named_by_their_key(value: Any, sentences: list[str]) -> None:
    assert entry_problems(value, KEY) == sentences
    with pytest.raises(UserError) as error:
        check({"train_files": value})
    assert str(error.value).splitlines() == sentences


def test_a_share_held_out_excludes_validation_files(in_tmp: Path) -> None:
    write(Path("a.parquet"))
    files = {"train_files": "a.parquet"}
    assert check({**files, "val_fraction": 0.1}).data.val_fraction == 0.1
    for share in (1.0, -0.1):
        with pytest.raises(UserError, match=rf"^data\.val_fraction={share}: must be at least 0 and below 1$"):
            check({**files, "val_fraction": share})
    with pytest.raises(
        UserError, match=r"^data\.val_fraction=0\.1 with data\.val_files: set one of the two \(data\.val_"
    ):
        check({**files, "val_files": "a.parquet", "val_fraction": 0.1})


def test_hub_names_and_urls_are_not_looked_up_by_the_check_of_the_configuration() -> None:
    check({"train_files": ["org/set", "org/set/train.parquet", "s3://bucket/a.parquet", "https://host/a.parquet"]})
