"""Rows of `model.attributes`: a number for each name of a response, and no preferences."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rm_gallery.data.formats import FormatConfig, RowCounts, choose_format, read_groups
from rm_gallery.data.formats.row_reader import Readers
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup

NAMES = ["helpfulness", "verbosity"]


def read(values: list[dict[str, Any]], **options: Any) -> tuple[list[PreferenceGroup], RowCounts]:
    rows = [Row(each, "a.jsonl", place) for place, each in enumerate(values)]
    config, counts = FormatConfig(attributes=NAMES, **options), RowCounts()
    groups = []
    for reader, of_file in Readers(config, has_chat_template=True).by_file(rows):
        groups += [group for _, group, _ in read_groups(of_file, reader, counts)]
    return groups, counts


def numbers(group: PreferenceGroup) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in each.attributes] for each in group.ratings]


def test_rows_of_a_prompt_are_one_group_and_may_lack_numbers() -> None:
    groups, counts = read(
        [
            {"prompt": "Why?", "response": "a", "helpfulness": 4, "verbosity": None, "weight": 0.5},
            {"prompt": "Why?", "response": "b", "helpfulness": "3", "verbosity": 1},
            {"prompt": "How?", "response": "c", "helpfulness": 2, "verbosity": 2},
            {"prompt": "Who?", "response": "d", "helpfulness": None, "verbosity": None},
            {"prompt": "When?", "response": "e", "helpfulness": "much", "verbosity": 1},
        ]
    )
    assert [numbers(group) for group in groups] == [[[4, None], [3, 1]], [[2, 2]]]
    assert [each.weight for each in groups[0].ratings] == [0.5, 1]
    assert not any(group.comparisons for group in groups)
    assert counts.dropped.counts == {"no value of helpfulness, verbosity": 1, "helpfulness that is not a number": 1}


def test_numbers_may_be_in_an_object_and_responses_in_messages() -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    groups, _ = read([{"messages": turns, "attributes": json.dumps({"helpfulness": 3, "verbosity": 0.5})}])
    assert numbers(groups[0]) == [[3, 0.5]]
    assert groups[0].prompt == turns[:1] and groups[0].responses == [turns[1:]]
    groups, _ = read([{"prompt": "Why?", "response": "So.", "verbosity": 1, "attributes": {"helpfulness": 3}}])
    assert numbers(groups[0]) == [[3, 1]]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(UserError) as caught:
        read([{"prompt": "Why?", "response": "a", "helpfulness": 4}])
    assert str(caught.value).startswith(
        "a.jsonl: no column 'verbosity' of model.attributes or objective.score_column (columns: prompt, response, "
        "helpfulness) and no such field "
        "in 'attributes'; rename the column, or remove the name."
    )
    with pytest.raises(UserError, match=r"no column 'response' \(columns: prompt, chosen, rejected"):
        read([{"prompt": "Why?", "chosen": "a", "rejected": "b", "helpfulness": 4, "verbosity": 1}])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"responses": ["a", "b"], "scores": [1, 3.5]}, [(1.0, None), (3.5, None)]),
        ({"responses": ["a", "b"], "ranks": [2, 1]}, [(None, 2.0), (None, 1.0)]),
    ],
)
def test_scores_and_ranks_travel_with_the_responses(values: dict[str, Any], expected: list[Any]) -> None:
    rows = [Row({"prompt": "Why?", **values}, "a.jsonl", 0)]
    reader = Readers(FormatConfig(), has_chat_template=True).get(choose_format(rows, FormatConfig(), quiet=True).name)
    assert [(each.score, each.rank) for each in reader.read(rows[0]).ratings] == expected
