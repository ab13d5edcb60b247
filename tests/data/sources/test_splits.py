"""Splits: the same files belong together as the datasets library would say."""

from __future__ import annotations

from typing import Any

import pytest

from rm_gallery.data.sources.splits import Splits, choose_split, choose_subset, layout_of, splits_by_name
from rm_gallery.errors import UserError

PREFERENCE_700K = [".gitattributes", "README.md", *(f"data/train-0000{part}-of-00003-0123456789abcdef.parquet"
                                                     for part in range(3))]  # fmt: skip
ULTRAFEEDBACK = [
    "README.md", "data/test_prefs-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet",
    "data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet",
]  # fmt: skip
HELPSTEER3 = ["README.md", *(f"{subset}/{split}.jsonl.gz" for subset in ("preference", "feedback")
                             for split in ("train", "validation"))]  # fmt: skip
HELPSTEER3_README = """---
license: cc-by-4.0
configs:
- config_name: preference
  default: true
  data_files:
  - split: train
    path: "preference/train.jsonl.gz"
  - split: validation
    path: ["preference/validation.jsonl.gz"]
- config_name: feedback
  data_files: {train: feedback/train*, validation: ./feedback/val*}
---
# HelpSteer3
"""


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (PREFERENCE_700K, {"train": PREFERENCE_700K[2:]}),
        (["train.csv", "dev.csv", "my-test.csv", "extra.csv"],
         {"train": ["train.csv"], "validation": ["dev.csv"], "test": ["my-test.csv"]}),
        (["Train/a.jsonl", "val/b.jsonl", "README.md"], {"train": ["Train/a.jsonl"], "validation": ["val/b.jsonl"]}),
        (["data/eval/train_0.jsonl", "data/train/test_0.jsonl"],
         {"test": ["data/eval/train_0.jsonl"], "train": ["data/train/test_0.jsonl"]}),
        (["a.jsonl", "contest.jsonl", "trained.jsonl"], {"": ["a.jsonl", "contest.jsonl", "trained.jsonl"]}),
        (["data/part-00000-of-00002.parquet", "data/part-00001-of-00002.parquet"],
         {"": ["data/part-00000-of-00002.parquet", "data/part-00001-of-00002.parquet"]}),
        (["train-00000-of-00001.parquet", "stats.txt", "dataset_infos.json", ".cache/x.parquet"],
         {"train": ["train-00000-of-00001.parquet"]}),
        (["notes.txt"], None),
    ],
)  # fmt: skip
def test_names_tell_splits_apart(paths: list[str], splits: Splits | None) -> None:
    layout = layout_of(paths)
    assert layout.subsets == ({"default": splits} if splits else {})


def test_shards_may_name_splits_of_any_kind() -> None:
    splits = layout_of(ULTRAFEEDBACK).subsets["default"]
    assert sorted(splits) == ["test_prefs", "test_sft", "train_prefs", "train_sft"]
    assert choose_split(splits, "train_prefs", "train", "k=v") == ["data/train_prefs-00000-of-00001.parquet"]
    with pytest.raises(UserError) as error:
        choose_split(splits, None, "train", "data.train_files=org/set")
    assert str(error.value) == (
        "data.train_files=org/set: has no split 'train'; it has test_prefs, test_sft, train_prefs, train_sft. "
        "Name one of these as split"
    )


def test_the_readme_decides_where_it_has_configs() -> None:
    layout = layout_of(HELPSTEER3, HELPSTEER3_README)
    assert layout.default == "preference"
    assert layout.subsets == {
        subset: {split: [f"{subset}/{split}.jsonl.gz"] for split in ("train", "validation")}
        for subset in ("preference", "feedback")
    }
    assert choose_subset(layout, "feedback", "k=v") == layout.subsets["feedback"]
    with pytest.raises(UserError, match=r"has no subset 'preferences'; it has preference, feedback\. Did you mean 'pr"):
        choose_subset(layout, "preferences", "k=v")


def test_several_subsets_without_a_default_must_be_named() -> None:
    layout = layout_of(HELPSTEER3, HELPSTEER3_README.replace("  default: true\n", ""))
    with pytest.raises(
        UserError, match=r"holds several subsets \(preference, feedback\); choose one in an entry, e.g."
    ):
        choose_subset(layout, None, "k=v")


def test_a_config_may_name_a_folder_only() -> None:
    readme = "---\r\nconfigs:\r\n- config_name: one\r\n  data_dir: ./sub/\r\n---\r\n"
    assert layout_of(["sub/train.csv", "sub/test.csv", "train.csv"], readme).subsets == {
        "one": {"train": ["sub/train.csv"], "test": ["sub/test.csv"]}
    }


@pytest.mark.parametrize(
    "readme",
    ["", "# Title", "---\nconfigs: [\n---\n", "---\nconfigs: 1\n---\n", "---\n- a\n---\n",
     "---\nconfigs: [{a: 1}]\n---\n",
     "---\nlicense: mit\n---\n", "---\nconfigs:\n- config_name: x", "---\n" + "[" * 1200 + "\n---\n"],
)  # fmt: skip
def test_a_readme_without_usable_configs_leaves_it_to_the_names(readme: str) -> None:
    assert layout_of(["a/train.csv"], readme).subsets == {"default": {"train": ["a/train.csv"]}}


@pytest.mark.parametrize("data_files", ["1", "[1]", "{train: 1}", "[{split: train}]", "nothing*", "null"])
def test_odd_data_files_name_nothing(data_files: str) -> None:
    layout = layout_of(["a/train.csv"], f"---\nconfigs:\n- config_name: x\n  data_files: {data_files}\n---\n")
    assert layout.subsets in ({}, {"x": {"train": ["a/train.csv"]}})


def test_what_the_hub_converted_is_known_by_its_folders() -> None:
    paths = ["default/train_prefs/0000.parquet", "default/train_prefs/0001.parquet", "default/test/0000.parquet"]
    assert layout_of(paths).subsets == {"default": {"train_prefs": paths[:2], "test": paths[2:]}}
    layout = layout_of(["one/train/0000.parquet", "two/partial-train/0000.parquet"])
    assert layout.default is None
    assert layout.subsets["two"] == {"partial-train": ["two/partial-train/0000.parquet"]}


@pytest.mark.parametrize(
    ("splits", "wanted", "role", "chosen"),
    [
        ({"train": ["a"], "test": ["b"]}, None, "train", "a"),
        ({"train": ["a"], "test": ["b"]}, None, "val", "b"),
        ({"test": ["a"], "dev": ["b"]}, None, "val", "b"),
        ({"train": ["a"], "eval": ["b"]}, None, "val", "b"),
        ({"train": ["a"], "valid": ["b"]}, "validation", "train", "b"),
        ({"": ["a"]}, None, "train", "a"),
        ({"": ["a"]}, "train", "val", "a"),
        ({"train": ["a"], "v1.0": ["b"]}, "v1.0", "train", "b"),
    ],
)
def test_the_split_that_fits_is_chosen(splits: Splits, wanted: str | None, role: Any, chosen: str) -> None:
    assert choose_split(splits, wanted, role, "k=v") == [chosen]


ONLY_TRAIN = (
    "it has train. Name one of these as split, or leave data.val_files empty and set data.val_fraction to hold out a "
    "share"
)


@pytest.mark.parametrize(
    ("wanted", "role", "sentence"),
    [
        ("test", "val", f"k=v: has no split 'test'; {ONLY_TRAIN}"),
        (None, "val", f"k=v: has no split 'validation' or 'test'; {ONLY_TRAIN}"),
        ("trian", "train", "k=v: has no split 'trian'; it has train. Did you mean 'train'? Name one of these as split"),
    ],
)  # fmt: skip
def test_a_missing_split_names_those_that_exist(wanted: str | None, role: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        choose_split(splits_by_name(["train.csv"]), wanted, role, "k=v")
    assert str(error.value) == sentence
