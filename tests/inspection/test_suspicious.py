"""Suspicious pairs and dropped rows: each check finds its row, and reports file:row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.inspection.data import Show, counts, pair, plain_rows

LONG = "A sentence that is long enough. " * 8
SUSPICIOUS = {
    "same_words": pair("q", "Yes, of course!", "yes of course"),
    "no_words": pair("q", "a fine answer", "?!..."),
    "beginning": pair("q", "It is the capital of France, since 987.", "It is the capital of France"),
    "inside": pair("q", "it is the capital of France", "Well, it is the capital of France, so they say."),
    "chosen_cut": pair("q", f"{LONG}It ends in the", f"{LONG}All is well."),
    "rejected_cut": pair("q", f"{LONG}All is well.", f"{LONG}It ends in the"),
    "short_chosen": pair("q", "Yes indeed.", "No, that is something else."),
    "p_below_half": pair("q", "alpha beta gamma", "delta epsilon zeta", p_chosen=0.25),
    "negative_margin": pair("q", "alpha beta gamma", "delta epsilon zeta", margin=-1.0),
}


@pytest.mark.parametrize("key", SUSPICIOUS)
@pytest.mark.slow
def test_a_check_finds_its_row_alone(key: str, show: Show) -> None:
    rows = [*plain_rows(3, seed=0), SUSPICIOUS[key], *plain_rows(2, seed=1)]
    found = show.of([{"margin": None, "p_chosen": None, **row} for row in rows]).train["suspicious"]
    assert counts(found) == {key: 1}
    assert [each["examples"] for each in found if each["count"]] == [["train.parquet:3"]]


def test_ordinary_pairs_are_not_suspicious(show: Show) -> None:
    report = show.of(plain_rows(20, seed=0))
    assert counts(report.train["suspicious"]) == {}
    assert len(report.train["suspicious"]) == len(SUSPICIOUS), "checks without a hit are reported too"


def test_dropped_rows_are_counted_by_reason_whatever_bad_rows_says(show: Show) -> None:
    bad = [pair("q1", "same", "same"), pair("q2", "", "b"), pair("q3", "same", "same")]
    for bad_rows in ("drop", "error"):
        train = show.of([*plain_rows(3, seed=0), *bad], None, f"data.bad_rows={bad_rows}").train
        assert (train["num_rows"], train["num_groups"], train["num_pairs"]) == (6, 3, 3)
        assert [(each["title"], each["count"], each["examples"]) for each in train["dropped"]] == [
            ("chosen equal to rejected", 2, ["train.parquet:3"]), ("empty chosen", 1, ["train.parquet:4"])
        ]  # fmt: skip


def test_rankings_give_several_pairs_and_broken_lines_are_dropped(show: Show) -> None:
    ranking: dict[str, Any] = {"responses": ["a b", "c d", "e f"], "scores": [1, 2, 2]}
    lines = [json.dumps({"prompt": f"question {number}", **ranking}) for number in range(8)]
    Path("a.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"prompt": "q", "responses": ["a"]})]) + "\n")
    train = show("data.train_files=a.jsonl").train
    assert (train["num_groups"], train["num_pairs"]) == (8, 16)
    assert sorted(each["examples"][0] for each in train["dropped"]) == ["a.jsonl:8", "a.jsonl:9"]


@pytest.mark.parametrize("rows", [[], [pair("q", "same", "same")]])
def test_data_without_a_usable_row_are_refused(rows: list[dict[str, Any]], show: Show) -> None:
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = show.error("data.train_files=a.jsonl")
    assert "a.jsonl" in message if not rows else "chosen equal to rejected (first: " in message
