"""Duplicates, contradictory labels, near duplicates and train/validation leakage, on rows whose answer is known."""

from __future__ import annotations

import random

from tests.inspection.data import Show, by_key, counts, flipped, pair, plain_rows, words


def test_each_copy_after_the_first_is_a_duplicate(show: Show) -> None:
    rows = plain_rows(4, seed=0)
    found = by_key(show.of([*rows, rows[1], rows[1], rows[2]]).train["duplicates"])["repeated_pairs"]
    assert (found["count"], found["total"]) == (3, 7)
    assert found["examples"] == [f"train.parquet:{a} = train.parquet:{b}" for a, b in ((1, 4), (1, 5), (2, 6))]


def test_the_same_responses_to_another_prompt_are_no_duplicate(show: Show) -> None:
    report = show.of([pair(f"question {number}", "a b c", "d e f") for number in range(3)])
    assert counts(report.train["duplicates"]) == {}


def test_both_labels_of_a_contradiction_count(show: Show) -> None:
    rows = plain_rows(3, seed=0)
    duplicates = show.of([*rows, rows[0], flipped(rows[0])]).train["duplicates"]
    assert counts(duplicates) == {"repeated_pairs": 1, "contradictions": 3}
    assert by_key(duplicates)["contradictions"]["examples"] == ["train.parquet:0 = train.parquet:4"]


def test_a_ranking_with_its_responses_in_another_order_is_a_duplicate(show: Show) -> None:
    draw = random.Random(0)
    texts = [words(draw, 12) for _ in range(3)]
    rows = [
        {"prompt": "q", "responses": texts, "scores": [3.0, 2.0, 1.0]},
        {"prompt": "q", "responses": texts[::-1], "scores": [1.0, 2.0, 3.0]},
    ]
    assert counts(show.of(rows).train["duplicates"]) == {"repeated_pairs": 3}


def test_near_duplicates_share_most_word_triples_and_are_no_copies(show: Show) -> None:
    draw = random.Random(0)
    rows = [pair(words(draw, 20), words(draw, 40), words(draw, 40)) for _ in range(30)]
    near = [
        {**rows[3], "chosen": rows[3]["chosen"] + " Indeed."},
        {**rows[3], "rejected": rows[3]["rejected"] + " So."},
    ]
    duplicates = show.of([*rows, *near, rows[5]]).train["duplicates"]
    assert counts(duplicates) == {"repeated_pairs": 1, "near_duplicates": 2}
    assert by_key(duplicates)["near_duplicates"]["examples"] == [
        "train.parquet:3 ~ train.parquet:30", "train.parquet:3 ~ train.parquet:31"
    ]  # fmt: skip


def test_short_rows_are_not_compared_for_near_duplicates(show: Show) -> None:
    report = show.of([pair("yes or no", "yes it is", "no it is not"), pair("yes or no", "yes it is", "no it is so")])
    assert counts(report.train["duplicates"]) == {}


def test_leakage_counts_pairs_labels_and_prompts_of_validation_rows(show: Show) -> None:
    rows = plain_rows(20, seed=0)
    val = [
        *plain_rows(6, seed=1),
        rows[5],
        flipped(rows[6]),
        {**rows[7], "chosen": "a b c d e.", "rejected": "f g h i j."},
        pair("a question of its own", rows[8]["chosen"], "k l m n o."),
    ]
    found = show.of(rows, val).leakage
    assert {key: each["count"] for key, each in found.items()} == {
        "shared_prompts": 3, "shared_responses": 3, "shared_pairs": 1, "flipped_pairs": 1, "near_shared": 0
    }  # fmt: skip
    assert {each["total"] for each in found.values()} == {10}
    assert found["shared_pairs"]["examples"] == ["val.parquet:6"]
    assert found["flipped_pairs"]["examples"] == ["val.parquet:7"]
    assert found["shared_prompts"]["examples"] == ["val.parquet:6", "val.parquet:7", "val.parquet:8"]


def test_near_leakage_leaves_exact_copies_to_the_shared_pairs(show: Show) -> None:
    draw = random.Random(0)
    rows = [pair(words(draw, 20), words(draw, 40), words(draw, 40)) for _ in range(10)]
    near = {**rows[4], "rejected": rows[4]["rejected"] + " Indeed."}
    found = show.of(rows, [rows[2], near, pair(words(draw, 20), words(draw, 40), words(draw, 40))]).leakage
    assert (found["shared_pairs"]["count"], found["near_shared"]["count"]) == (1, 1)
    assert found["near_shared"]["examples"] == ["val.parquet:1"]


def test_a_constant_instruction_is_no_leaked_prompt(show: Show) -> None:
    draw = random.Random(0)
    rows = [pair("Which is better?", words(draw, 12), words(draw, 12)) for _ in range(12)]
    report = show.of([*rows[:8], *plain_rows(1, seed=1)], rows[8:])
    assert "shared_prompts" not in report.leakage and "shared_pairs" in report.leakage
    assert report.level("One prompt") == "warning"


def test_a_held_out_share_has_no_prompt_in_common(show: Show) -> None:
    rows = plain_rows(40, seed=0)
    report = show.of([*rows, *rows], None, "data.val_fraction=0.3")
    assert sum(split["num_groups"] for split in report.splits) == 80
    assert {each["count"] for each in report.leakage.values()} == {0}


def test_without_validation_data_there_is_no_leakage_to_report(show: Show) -> None:
    assert show.of(plain_rows(4, seed=0)).leakage == {}
