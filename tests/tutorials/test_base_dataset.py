"""BaseTrainDataset: hooks with defaults that a class overrides one by one, and a sequence to look at."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.data.custom import CustomReader
from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.small import make_tokenizer, write_pairs
from tests.templates import TEMPLATES, make_templated
from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset

USER = {"role": "user", "content": "Why?"}
PAIR = (Comparison(0, 1),)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


class Votes(BaseTrainDataset):
    """The example of `build_group`'s docstring."""

    def build_group(self, row: dict[str, Any]) -> PreferenceGroup | tuple[None, str] | None:
        first, second = row["votes"]
        if first == second:
            return None, "as many votes for both"
        better = 0 if first > second else 1
        return PreferenceGroup(
            prompt=[{"role": "user", "content": row["question"]}],
            responses=row["answers"],
            comparisons=[Comparison(better, 1 - better, weight=abs(first - second))],
        )


@pytest.fixture
def files(in_tmp: Path) -> Path:
    """Two files of pairs, and one of votes."""
    rows = [{"prompt": f"Why {n}?", "chosen": f"So {n}.", "rejected": None if n == 4 else "No."} for n in range(5)]
    write_pairs(in_tmp / "data/a.parquet", rows[:3])
    write_pairs(in_tmp / "data/b.parquet", rows[3:])
    votes = [{"question": "Why?", "answers": ["a", "b"], "votes": votes} for votes in ([1, 4], [2, 2])]
    write_pairs(in_tmp / "votes.parquet", votes)
    return in_tmp


def test_it_is_a_sequence_of_groups(files: Path) -> None:
    dataset = BaseTrainDataset(["data/a.parquet", Path("data/b.parquet")])
    assert isinstance(dataset, Sequence)
    assert len(dataset) == 5
    where = "data/a.parquet:2"
    expected = PreferenceGroup(
        [{"role": "user", "content": "Why 2?"}], [said("So 2."), said("No.")], PAIR, "chat", where
    )
    assert dataset[2] == dataset[-3] == expected
    assert [group.where for group in dataset[2:4]] == [where, "data/b.parquet:0"]
    assert len(BaseTrainDataset("data")) == 5, "a folder, as in data.train_files"
    assert len(BaseTrainDataset()) == 0
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(UserError, match=r"^data/b\.parquet:1: null rejected; training drops this row$"):
        dataset[4]
    with pytest.raises(UserError, match=r"^data\.train_files=nope\.parquet: no such file or folder"):
        len(BaseTrainDataset("nope.parquet"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_texts_of_a_row_are_those_of_training(name: str, files: Path) -> None:
    tokenizer = make_templated(name)
    dataset = BaseTrainDataset("data/a.parquet", tokenizer)
    reader = CustomReader(BaseTrainDataset, FormatConfig(), tokenizer)
    group = dataset[0]
    assert dataset.texts(0) == [reader.render(group.prompt, response) for response in group.responses]
    assert "So 0." in dataset.texts(0)[0] and "No." in dataset.texts(0)[1]
    assert (tokenizer.chat_template is None) == name.startswith("none"), "the given tokenizer stays as it is"


def test_texts_of_bare_text_need_no_tokenizer_and_others_do(files: Path) -> None:
    class Bare(BaseTrainDataset):
        def build_group(self, row: dict[str, Any]) -> PreferenceGroup:
            return PreferenceGroup(row["prompt"], [" yes", " no"], PAIR)

    assert Bare("data/a.parquet").texts(1) == ["Why 1? yes", "Why 1? no"]
    with pytest.raises(UserError, match=r"^texts need a tokenizer; pass one to the dataset$"):
        BaseTrainDataset("data/a.parquet").texts(0)


def test_votes_become_a_weighted_comparison_or_a_reason(files: Path) -> None:
    votes = Votes("votes.parquet", make_tokenizer())
    assert votes[0].comparisons == (Comparison(1, 0, weight=3),)
    assert votes[0].responses == [said("a"), said("b")]
    assert votes.texts(0)[0] == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    with pytest.raises(UserError, match=r"^votes\.parquet:1: as many votes for both; training drops this row$"):
        votes[1]
    example = inspect.getdoc(BaseTrainDataset.build_group)
    assert example is not None
    body = [line.strip() for line in inspect.getsource(Votes.build_group).splitlines()[1:]]
    assert "\n".join(body) in "\n".join(line.strip() for line in example.splitlines())


def test_every_hook_has_a_default() -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "data_source": "made/up", "ground_truth": {"a": 1}}
    group = CustomReader(BaseTrainDataset, FormatConfig(), make_tokenizer()).read(Row(row, "a.parquet", 0))
    assert (group.prompt, group.source, group.metadata) == ([USER], "made/up", {"ground_truth": {"a": 1}})
    bare = {"chosen": [USER, *said("So.")], "rejected": [USER, *said("No.")], "source": 5}
    group = CustomReader(BaseTrainDataset, FormatConfig(), make_tokenizer()).read(Row(bare, "a.parquet", 0))
    assert [[*group.prompt, *each] for each in group.responses] == [bare["chosen"], bare["rejected"]]
    assert (group.source, group.metadata) == ("5", {})


def test_the_default_group_can_be_built_on() -> None:
    class Weighted(BaseTrainDataset):
        def build_group(self, row: dict[str, Any]) -> PreferenceGroup | tuple[None, str] | None:
            made = super().build_group(row)
            assert isinstance(made, PreferenceGroup)
            return PreferenceGroup(made.prompt, made.responses, [Comparison(0, 1, row["weight"])], "chat")

    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "weight": 0.5}
    reader = CustomReader(Weighted, FormatConfig(), make_tokenizer())
    assert reader.read(Row(row, "a.parquet", 0)).comparisons == (Comparison(0, 1, 0.5),)
    with pytest.raises(UserError, match=r"^a\.parquet:1: Weighted\.build_group raised KeyError: 'weight' \(test_base_"):
        reader.read(Row({key: row[key] for key in ("prompt", "chosen", "rejected")}, "a.parquet", 1))


def test_the_config_is_the_data_section(files: Path) -> None:
    for config in ({"prompt_key": None, "chosen_key": "prompt"}, FormatConfig(prompt_key=None, chosen_key="prompt")):
        dataset = BaseTrainDataset("data/a.parquet", config=config)  # type: ignore[arg-type]
        assert dataset[0].responses == [said("Why 0?"), said("No.")]
        assert dataset.config.get("rejected_key") == dataset.config.rejected_key == "rejected"
    assert BaseTrainDataset(processor="kept").processor == "kept"


def test_the_base_class_loads_no_torch() -> None:
    code = "import sys, tutorials.cookbooks.training_reward_model.base; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ran.stdout.strip() == "False", ran.stderr
