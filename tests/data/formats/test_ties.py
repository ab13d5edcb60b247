"""Ties in every layout that has them: tied comparisons where they are read, else dropped and counted."""

from __future__ import annotations

from typing import Any

import pytest

from rm_gallery.data.custom.hooks import DataSection, read_row
from rm_gallery.data.formats import FormatConfig, RowCounts, read_groups
from rm_gallery.data.formats.row_reader import Readers
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, PreferenceGroup

HI = [{"role": "user", "content": "hi"}]
A, B = ([{"role": "assistant", "content": text}] for text in "ab")
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "scores": ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}, "all scores equal"),
    "ranks": ({"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 1]}, "all ranks equal"),
    "lmsys": (
        {"prompt": '["hi"]', "response_a": '["a"]', "response_b": '["b"]',
         "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        "winner that is a tie",
    ),
    "arena": ({"conversation_a": HI + A, "conversation_b": HI + B, "winner": "tie (bothbad)"}, "winner that is a tie"),
    "both": ({"prompt": "hi", "response_a": "a", "response_b": "b", "winner": "both"}, "winner that is a tie"),
    "helpsteer3": (
        {"context": HI, "response1": "a", "response2": "b", "overall_preference": 0}, "overall_preference that is a tie"
    ),
    "completions": (
        {"instruction": "hi", "completions": [{"response": text, "overall_score": 3} for text in "ab"]},
        "all labels or scores in completions equal",
    ),
    "labels": (
        {"input": HI, "output": [{"answer": {**turn[0], "label": {"is_preferred": False}}} for turn in (A, B)]},
        "all labels in output equal",
    ),
    "helpsteer2": ({"prompt": "hi", "response": "a", "helpfulness": 3}, "all helpfulness of a prompt equal"),
}  # fmt: skip


def read(rows: list[dict[str, Any]], *, ties: bool) -> tuple[list[list[tuple[int, int, bool]]], dict[str, int]]:
    counts, found = RowCounts(), []
    config = FormatConfig(ties=ties)
    for reader, of_file in Readers(config, has_chat_template=True).by_file(
        Row(each, "a.jsonl", place) for place, each in enumerate(rows)
    ):
        for _, group, _ in read_groups(of_file, reader, counts):
            found.append([(each.better, each.worse, each.tied) for each in group.comparisons])
    return found, dict(counts.dropped.counts)


@pytest.mark.parametrize("layout", ROWS)
def test_a_tie_is_a_comparison_where_ties_are_read(layout: str) -> None:
    row, reason = ROWS[layout]
    rows = [row, {**row, "response": "b"}] if layout == "helpsteer2" else [row]
    [[(better, worse, tied)]], dropped = read(rows, ties=True)
    assert {better, worse} == {0, 1} and tied and not dropped
    assert read(rows, ties=False) == ([], {reason: 1})


def test_ties_in_rankings_and_lists() -> None:
    ranking = {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [2, 1, 1]}
    assert read([ranking], ties=True)[0] == [[(0, 1, False), (0, 2, False), (2, 1, True)]]
    assert read([ranking], ties=False)[0] == [[(0, 1, False), (0, 2, False)]]
    lists = {"prompt": "hi", "chosen": ["a", "b"], "rejected": ["c"]}
    assert read([lists], ties=True)[0] == [[(0, 2, False), (1, 2, False)]], "two chosen responses are not called equal"


class Mine:
    def build_group(self, row: dict[str, Any]) -> PreferenceGroup:
        comparisons = [Comparison(0, 1), Comparison(1, 2, tied=True)]
        return PreferenceGroup("hi", ["a", "b", "c"], comparisons[row["from"] :])


def test_ties_of_a_custom_class_are_dropped_unless_they_are_read() -> None:
    def tied(start: int, *, ties: bool) -> list[bool]:
        group = read_row(Mine(), Row({"from": start}, "a.jsonl", 0), DataSection(FormatConfig(ties=ties)))
        return [each.tied for each in group.comparisons]

    assert tied(0, ties=True) == [False, True] and tied(0, ties=False) == [False]
    with pytest.raises(BadRow, match="a tie"):
        tied(1, ties=False)
