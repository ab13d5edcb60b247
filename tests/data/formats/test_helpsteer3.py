"""HelpSteer3 as published: who is better by the sign, how much by the distance to 0, how many agree by person."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.data.formats.rows import assistant, conversations, only, order, read_one, user, why

ROW: dict[str, Any] = {
    "domain": "general",
    "language": "english",
    "context": [user("a"), assistant("b"), user("c")],
    "response1": "one",
    "response2": "two",
    "overall_preference": -2,
    "individual_preference": [
        {"score": -2, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
        {"score": -1, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
        {"score": 1, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
        {"score": 0, "reasoning": "...", "feedback1": "...", "feedback2": "..."},
    ],
}


def test_below_zero_the_first_response_is_better_and_above_the_second() -> None:
    assert order(read_one(ROW)) == [(0, 1)]
    assert order(read_one({**ROW, "overall_preference": 1})) == [(1, 0)]
    assert only(read_one(ROW)).margin == 2
    assert only(read_one({**ROW, "overall_preference": 3})).margin == 3
    assert conversations(ROW) == [[*ROW["context"], assistant("one")], [*ROW["context"], assistant("two")]]


def test_people_give_the_share_that_prefers_the_better_response_and_a_tie_counts_half() -> None:
    assert only(read_one(ROW)).p_better == 2.5 / 4
    assert only(read_one({**ROW, "overall_preference": 1})).p_better == 1.5 / 4
    people = [{"score": -1}, {"score": None}]
    assert only(read_one({**ROW, "individual_preference": people})).p_better == 1
    assert only(read_one({**ROW, "individual_preference": json.dumps(people)})).p_better == 1


@pytest.mark.parametrize("people", [None, [], [{"score": None}]])
def test_without_people_there_is_no_share(people: Any) -> None:
    assert only(read_one({**ROW, "individual_preference": people})).p_better is None
    row = {key: value for key, value in ROW.items() if key != "individual_preference"}
    assert only(read_one(row)).p_better is None
    assert only(read_one(ROW, individual_preference=None)).p_better is None


def test_helpsteer2_preferences_are_read_under_their_own_names() -> None:
    row = {"prompt": "hi", "response_1": "one", "response_2": "two", "preference_strength": 2}
    names = {"context": "prompt", "response1": "response_1", "response2": "response_2"}
    group = read_one(row, **names, overall_preference="preference_strength", individual_preference=None)
    assert order(group) == [(1, 0)]
    assert group.prompt == [user("hi")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overall_preference": 0}, "overall_preference that is a tie"),
        ({"overall_preference": None}, "null overall_preference"),
        ({"overall_preference": 4}, "overall_preference outside -3 to 3"),
        ({"overall_preference": -100}, "overall_preference outside -3 to 3"),
        ({"overall_preference": math.nan}, "overall_preference that is not finite"),
        ({"response1": None}, "null response1"),
        ({"context": None}, "text responses without context"),
        ({"response2": "one"}, "response1 equal to response2"),
        ({"context": [{"content": "x"}]}, "context with a message that has no role"),
        ({"individual_preference": [{"reasoning": "x"}]}, "individual_preference without a score of each annotator"),
        ({"individual_preference": [-1]}, "individual_preference without a score of each annotator"),
        ({"individual_preference": [{"score": "x"}]}, "score in individual_preference that is not a number"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(change: dict[str, Any], reason: str) -> None:
    assert why({**ROW, **change}) == reason
