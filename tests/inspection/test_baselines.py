"""Baselines: accuracy of the length rule and of the bag of words on data made for a known answer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.inspection.data import Show, flipped, pair, plain_rows, words

pytestmark = pytest.mark.slow


def long_rows(count: int, *, seed: int, ties: int = 0) -> list[dict[str, Any]]:
    """Pairs whose chosen response is the longer one; the last `ties` of them have equal lengths."""
    draw = random.Random(seed)
    rows = [pair(words(draw, 3), words(draw, 9), words(draw, 5)) for _ in range(count - ties)]
    return [*rows, *(pair(words(draw, 3), words(draw, 7), words(draw, 7)) for _ in range(ties))]


def test_few_pairs_have_no_baselines(show: Show) -> None:
    report = show.of(plain_rows(99, seed=0))
    assert report.baselines == {}
    assert any("99" in note and "100" in note for note in report.notes)


def test_a_tie_counts_half_for_the_length_rule(show: Show) -> None:
    found = show.of(long_rows(120, seed=3, ties=30)).baselines["length", "training"]
    assert found["accuracy"] == pytest.approx((90 + 15) / 120)
    assert found["num_pairs"] == 120


def test_the_length_rule_learns_that_shorter_is_better(show: Show) -> None:
    report = show.of([flipped(row) for row in long_rows(120, seed=3)])
    assert report.baselines["length", "training"]["accuracy"] == 1.0


def test_the_standard_error_is_that_of_a_proportion(show: Show) -> None:
    """100 right of 150 different prompts: sqrt(2/3 x 1/3 / 150)."""
    rows = [*long_rows(100, seed=3), *(flipped(row) for row in long_rows(50, seed=4))]
    found = show.of(rows).baselines["length", "training"]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["standard_error"] == pytest.approx((2 / 3 * 1 / 3 / 150) ** 0.5)


def test_validation_accuracy_is_that_of_the_rule_of_training(show: Show) -> None:
    val = [flipped(row) for row in long_rows(40, seed=5)]
    report = show.of(long_rows(120, seed=3), val)
    assert report.baselines["length", "training"]["accuracy"] == 1.0
    assert report.baselines["length", "validation"]["accuracy"] == 0.0
    assert report.baselines["words", "validation"]["accuracy"] < 0.1
    assert report.level("0.0") == "warning"


def test_a_bag_of_words_finds_the_word_that_decides(show: Show) -> None:
    draw = random.Random(3)
    rows = [pair(words(draw, 3), f"good {words(draw, 6)}", f"dull {words(draw, 6)}") for _ in range(120)]
    found = show.of(rows).baselines
    assert found["words", "training"]["accuracy"] > 0.95
    assert found["length", "training"]["accuracy"] == 0.5


def test_pairs_of_a_prompt_stay_in_one_fold(show: Show) -> None:
    """The better response is that of its prompt's own word: with the prompt in one fold it cannot be learned."""
    draw = random.Random(7)
    rows = []
    for _ in range(30):
        prompt, good, dull = (words(draw, 1) for _ in range(3))
        rows += [pair(prompt, f"{good} {words(draw, 6)}", f"{dull} {words(draw, 6)}") for _ in range(5)]
    report = show.of(rows)
    assert report.baselines["words", "training"]["accuracy"] < 0.7
    assert any("prompt" in note for note in report.notes)


def test_a_constant_prompt_is_split_pair_by_pair(show: Show) -> None:
    draw = random.Random(7)
    rows = [pair("Which is better?", f"good {words(draw, 6)}", f"dull {words(draw, 6)}") for _ in range(120)]
    report = show.of(rows)
    assert report.baselines["words", "training"]["accuracy"] > 0.95
    assert any("by pair" in note for note in report.notes)


def test_without_scikit_learn_the_note_says_what_to_install(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_gallery.inspection.baselines.find_spec", lambda name: None)
    report = show.of(plain_rows(120, seed=0))
    assert set(report.baselines) == {("length", "training")}
    assert any("pip install 'rm-gallery[data]'" in note for note in report.notes)


def test_two_reports_of_the_same_data_are_equal(show: Show) -> None:
    rows = plain_rows(120, seed=0)
    assert show.of(rows).values == show.of(rows).values
