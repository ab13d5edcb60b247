"""Baselines on pairs whose answer is known."""

from __future__ import annotations

import random

import pytest

from rm_gallery.inspection.baselines import BaselineReport, SampledPair, baseline_report, sampled_pair
from rm_gallery.inspection.reservoir import Reservoir
from tests.inspection.made import words


def _reservoir(pairs: list[SampledPair], capacity: int = 10_000) -> Reservoir[SampledPair]:
    reservoir: Reservoir[SampledPair] = Reservoir(capacity, seed=0)
    for pair in pairs:
        if (place := reservoir.wants()) is not None:
            reservoir.put(place, pair)
    return reservoir


def _accuracies(report: BaselineReport) -> dict[tuple[str, str], float]:
    return {(each.key, each.on): each.accuracy for each in report.baselines}


def _pairs(count: int, *, longer: float, word: float, seed: int = 0, per_prompt: int = 1) -> list[SampledPair]:
    """The chosen one is the longer with chance `longer`, and holds the word `good` with chance `word`."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        texts = [words(size, seed=seed * 1_000_003 + 2 * number + size) for size in (20, 12)]
        if draw.random() >= longer:
            texts.reverse()
        texts[0 if draw.random() < word else 1] += " good"
        found.append(sampled_pair(number // per_prompt, *texts))
    return found


def test_length_alone_finds_the_direction_by_itself() -> None:
    for longer in (0.8, 0.2):
        accuracy = _accuracies(baseline_report(_reservoir(_pairs(400, longer=longer, word=0.5)), None, seed=0))
        assert abs(accuracy["length", "training"] - 0.8) < 0.06


def test_words_are_found_where_length_says_nothing() -> None:
    accuracy = _accuracies(baseline_report(_reservoir(_pairs(400, longer=0.5, word=0.9)), None, seed=0))
    assert accuracy["words", "training"] > 0.65
    assert accuracy["length", "training"] < 0.6


def test_noise_stays_near_a_coin() -> None:
    report = baseline_report(_reservoir(_pairs(400, longer=0.5, word=0.5)), None, seed=0)
    for each in report.baselines:
        assert abs(each.accuracy - 0.5) < 4 * each.standard_error
        assert 0.01 < each.standard_error < 0.05


def test_pairs_of_a_prompt_are_on_one_side() -> None:
    # Each prompt has a word of its own that gives its pairs away to whoever saw one of them.
    pairs = []
    for number in range(400):
        texts = [f"x y {'left' if i else 'right'}{number // 8} z" for i in range(2)]
        pairs.append(sampled_pair(number // 8, *(texts if (number // 8) % 2 else texts[::-1])))
    report = baseline_report(_reservoir(pairs), None, seed=0)
    assert _accuracies(report)["words", "training"] < 0.65
    assert "split by prompt: all pairs of a prompt are on the same side" in report.notes


def test_pairs_of_a_prompt_count_as_one_observation() -> None:
    alone = baseline_report(_reservoir(_pairs(400, longer=0.5, word=0.5)), None, seed=0).baselines[0]
    copies = [pair for pair in _pairs(50, longer=0.5, word=0.5) for _ in range(8)]
    copies = [SampledPair(i // 8, p.better, p.worse, p.log_ratio) for i, p in enumerate(copies)]
    together = baseline_report(_reservoir(copies), None, seed=0).baselines[0]
    assert together.standard_error > 2 * alone.standard_error


def test_a_constant_prompt_is_said_and_split_by_pair() -> None:
    pairs = [SampledPair(7, p.better, p.worse, p.log_ratio) for p in _pairs(200, longer=0.9, word=0.5)]
    report = baseline_report(_reservoir(pairs), None, seed=0)
    assert report.notes[0].startswith("one prompt stands in most pairs")
    assert _accuracies(report)["length", "training"] > 0.8


def test_validation_pairs_are_asked_with_what_training_taught() -> None:
    train, val = _pairs(300, longer=0.9, word=0.5), _pairs(100, longer=0.1, word=0.5, seed=1)
    accuracy = _accuracies(baseline_report(_reservoir(train), _reservoir(val), seed=0))
    assert accuracy["length", "validation"] < 0.25
    assert accuracy["length", "training"] > 0.8


def test_the_same_seed_gives_the_same_figures() -> None:
    pairs = _pairs(200, longer=0.6, word=0.7)
    assert baseline_report(_reservoir(pairs), None, seed=3) == baseline_report(_reservoir(pairs), None, seed=3)


def test_a_sample_and_too_few_pairs_are_said() -> None:
    pairs = _pairs(300, longer=0.6, word=0.7)
    assert baseline_report(_reservoir(pairs, 200), None, seed=0).notes[0] == (
        "learned from 200 pairs drawn at random of 300"
    )
    few = baseline_report(_reservoir(pairs[:99]), None, seed=0)
    assert (few.baselines, few.notes) == ((), ("too few pairs for baselines: 99, at least 100 are needed",))


def test_without_scikit_learn_only_the_words_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_gallery.inspection.baselines.find_spec", lambda name: None)
    report = baseline_report(_reservoir(_pairs(200, longer=0.6, word=0.7)), None, seed=0)
    assert list(_accuracies(report)) == [("length", "training")]
    assert any("pip install 'rm-gallery[data]'" in note for note in report.notes)


@pytest.mark.parametrize("text", ["", "...", "\ud800", "\u6211\u7231\u4f60"])
def test_texts_without_words_do_no_harm(text: str) -> None:
    pairs = [sampled_pair(number, text, f"{text}{number}") for number in range(120)]
    assert len(baseline_report(_reservoir(pairs), None, seed=0).baselines) == 2


def test_a_reservoir_is_fair_ordered_and_repeatable() -> None:
    def draw(seed: int) -> list[int]:
        reservoir: Reservoir[int] = Reservoir(50, seed=seed)
        for number in range(1000):
            if (place := reservoir.wants()) is not None:
                reservoir.put(place, number)
        return reservoir.in_order()

    assert draw(1) == draw(1) == sorted(draw(1))
    counts = [number for seed in range(200) for number in draw(seed)]
    assert len(counts) == 200 * 50
    assert abs(sum(number < 100 for number in counts) - 1000) < 150
    assert Reservoir(0, seed=0).wants() is None
