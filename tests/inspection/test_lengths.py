"""Length bias, percentiles and what an epoch computes, on rows whose lengths are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.inspection.data import Show, files, pair, plain_rows

pytestmark = pytest.mark.slow


def by_length(count: int, chosen: int, rejected: int, *, seed: int = 0, **extra: Any) -> list[dict[str, Any]]:
    """Pairs of different texts with the given number of words of five characters."""
    rows = []
    for number in range(count):
        name = f"{seed}{number:04d}"
        rows.append(pair(f"q{name}", " ".join([name] * chosen), " ".join([f"x{name[1:]}"] * rejected), **extra))
    return rows


def test_length_bias_counts_longer_shorter_and_ties(show: Show) -> None:
    rows = [*by_length(3, 9, 4), *by_length(1, 4, 9, seed=1), *by_length(2, 5, 5, seed=2)]
    for found in show.of(rows).length_bias.values():
        assert (found["longer_chosen"], found["shorter_chosen"], found["ties"]) == (3, 1, 2)
    printed = show.text(*files(rows))
    assert "75.0%" in printed and "2 ties" in printed


def test_characters_and_words_may_disagree_on_which_is_longer(show: Show) -> None:
    found = show.of([pair("q", "a b c d", "incomprehensibilities")]).length_bias
    assert (found["characters"]["longer_chosen"], found["words"]["longer_chosen"]) == (0, 1)


def test_ties_alone_give_no_share(show: Show) -> None:
    report = show.of(by_length(3, 5, 5))
    assert report.length_bias["characters"]["ties"] == 3
    assert "no pair with different lengths" in show.text("data.train_files=train.parquet")


def test_length_bias_of_each_source(show: Show) -> None:
    rows = [*by_length(4, 9, 4, source="wordy"), *by_length(2, 4, 9, seed=1, source="brief")]
    rows.append(pair("q", "Yes, it is.", "YES IT IS", source="brief"))
    names = ("name", "pairs", "longer_chosen", "chosen_length", "rejected_length", "flagged")
    assert [tuple(each[name] for name in names) for each in show.of(rows).train["sources"]] == [
        ("wordy", 4, 1.0, 10, 5, 0), ("brief", 3, 1 / 3, 5, 10, 1)
    ]  # fmt: skip


def test_sources_beyond_twenty_are_counted_as_one(show: Show) -> None:
    rows = [
        each for number in range(22) for each in by_length(1 + (number < 19), 9, 4, seed=number, source=f"{number:02}")
    ]
    found = show.of(rows).train["sources"]
    assert [each["name"] for each in found] == [*(f"{number:02}" for number in range(19)), "(3 others)"]
    assert (found[-1]["pairs"], found[-1]["longer_chosen"]) == (3, 1.0)


@pytest.mark.parametrize(("chosen", "rejected", "which"), [(9, 4, "longer"), (4, 9, "shorter")])
def test_length_bias_is_a_warning(chosen: int, rejected: int, which: str, show: Show) -> None:
    report = show.of([*by_length(150, chosen, rejected), *by_length(50, rejected, chosen, seed=1)])
    [text] = [text for level, text in report.summary if f"{which} response" in text and level == "warning"]
    assert "75%" in text


def test_percentiles_are_values_of_the_data(show: Show) -> None:
    rows = [pair("q", " ".join(["word"] * number), "another") for number in range(1, 101)]
    chosen = {each["key"]: each for each in show.of(rows).train["lengths"]["distributions"]}["chosen"]
    found = tuple(chosen[key] for key in ("min", "p50", "p90", "p99", "max", "mean"))
    assert found == (2, 51, 91, 100, 101, 51.5), "the line break that ends a message counts as a word"
    assert sum(chosen["histogram"]["counts"]) == 100


def test_costs_by_hand(show: Show, qwen2_folder: Path) -> None:
    """Raw texts in bytes, one token each: prefix "ab", tails of 3 and 1, and prefix "c" with tails of 2 and 2."""
    rows = [{"chosen": "abxyz", "rejected": "abw"}, {"chosen": "cde", "rejected": "cfg"}]
    words = [f"model.partial_pretrain={qwen2_folder}", "data.input_style=text", "data.max_length=8"]
    cost = show.of(rows, None, *words).train["cost"]
    assert (cost["packed"], cost["separate"]) == (6 + 5, 8 + 6)
    assert cost["padded_batch"] == 4 * 5, "one batch of 8 pairs, all texts as long as the longest"
    assert cost["padded_max"] == 4 * 8


@pytest.mark.parametrize(
    ("settings", "kept", "severity", "words"),
    [
        (["data.filter_overlong_prompts=true"], 4, "error", "longer than data.max_length=12"),
        (["data.filter_overlong_prompts=false", "data.truncation=left"], 6, "error", "data.max_length=12"),
        (["data.filter_overlong_prompts=false", "data.truncation=error"], 6, "error", "data.max_length=12"),
    ],
)
def test_texts_beyond_max_length(
    settings: list[str], kept: int, severity: str, words: str, show: Show, qwen2_folder: Path
) -> None:
    rows = [{"chosen": f"c{number}", "rejected": f"r{number}"} for number in range(4)]
    rows += [{"chosen": "c" * 20 + str(number), "rejected": "r"} for number in range(2)]
    common = [f"model.partial_pretrain={qwen2_folder}", "data.input_style=text", "data.max_length=12"]
    report = show.of(rows, None, *common, *settings)
    lengths = report.train["lengths"]
    assert (lengths["num_encoded"], lengths["num_beyond"], report.train["num_groups"]) == (6, 2, kept)
    assert lengths["examples"] == ([] if kept == 4 else ["train.parquet:4", "train.parquet:5"])
    assert {each["key"]: each["max"] for each in lengths["distributions"]}["whole"] == 21
    assert report.level(words) == severity


def test_an_encoder_pads_and_shares_no_prompt(show: Show, tmp_path: Path) -> None:
    from tests.small import make_model

    folder = make_model("bert", tmp_path / "bert")
    rows = [{"chosen": "abxyz", "rejected": "abw"}, {"chosen": "cde", "rejected": "cfg"}]
    cost = show.of(rows, None, f"model.partial_pretrain={folder}", "data.max_length=16").train["cost"]
    assert cost["pads"]
    assert cost["separate"] == 7 + 5 + 5 + 5, "with [CLS] and [SEP]"
    assert cost["packed"] == cost["padded_batch"] == 4 * 7, "one micro-batch of 32 tokens holds all, padded"


def test_one_row_is_enough(show: Show) -> None:
    report = show.of(plain_rows(1, seed=0))
    assert report.train["num_pairs"] == 1 and report.level("contradict") is None
