"""Rankings: all pairs that differ are compared, ties are not, and what does not fit together is left out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.data.formats.rows import assistant, configured, conversations, order, read, read_one, user, why


def test_scores_compare_all_pairs_that_differ_with_the_difference_as_margin() -> None:
    group = read_one({"prompt": "hi", "responses": ["a", "b", "c"], "scores": [1, 3.5, 2]})
    assert order(group) == [(1, 0), (2, 0), (1, 2)]
    assert [each.margin for each in group.comparisons] == [2.5, 1.0, 1.5]
    assert conversations({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 2]}) == [
        [user("hi"), assistant("a")],
        [user("hi"), assistant("b")],
    ]


def test_rank_1_is_best_and_a_rank_is_no_margin() -> None:
    group = read_one({"prompt": "hi", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]})
    assert order(group) == [(1, 0), (2, 0), (1, 2)]
    assert [each.margin for each in group.comparisons] == [None] * 3


@pytest.mark.parametrize("labels", [{"scores": [2, 2, 1]}, {"ranks": [1, 1, 2]}])
def test_ties_are_not_compared(labels: dict[str, Any]) -> None:
    assert order(read_one({"prompt": "hi", "responses": ["a", "b", "c"], **labels})) == [(0, 2), (1, 2)]


def test_all_tied_leaves_the_row_out() -> None:
    assert why({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1.0]}) == "all scores equal"
    assert why({"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 1]}) == "all ranks equal"


def test_equal_responses_are_not_compared() -> None:
    assert order(read_one({"prompt": "hi", "responses": ["a", "a", "b"], "scores": [3, 2, 1]})) == [(0, 2), (1, 2)]
    assert why({"prompt": "hi", "responses": ["a", "a"], "scores": [3, 2]}) == "responses that are compared are equal"


@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_responses_are_texts_or_messages_or_lists_of_messages_or_their_json(write: Any) -> None:
    whole = [user("hi"), assistant("c")]
    row = {"prompt": "hi", "responses": write(["a", assistant("b"), whole, json.dumps(whole[1:])])}
    groups = conversations({**row, "scores": write([1, 2, 3, 3])})
    assert groups == [[user("hi"), assistant(text)] for text in ("a", "b", "c", "c")]


def test_conversations_need_no_prompt_beside_them() -> None:
    whole = [[user("hi"), assistant(text)] for text in "ab"]
    assert conversations({"responses": whole, "scores": [0, 1]}) == whole
    assert conversations({"prompt": None, "responses": whole, "scores": [0, 1]}) == whole


def test_weight_and_source_are_read_and_each_comparison_gets_the_weight() -> None:
    group = read_one(
        {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [1, 2, 3], "weight": 0.5, "source": "s", "margin": 9}
    )
    assert [each.weight for each in group.comparisons] == [0.5] * 3
    assert [each.margin for each in group.comparisons] == [1, 2, 1]
    assert group.source == "s"


def test_names_of_columns_can_be_changed() -> None:
    row = {"prompt": "hi", "answers": ["a", "b"], "stars": [1, 2], "place": [1, 2]}
    assert order(read_one(row, responses_key="answers", scores_key="stars")) == [(1, 0)]
    assert order(read_one(row, responses_key="answers", ranks_key="place")) == [(0, 1)]
    assert configured(scores_key=None).scores_key is None


@pytest.mark.parametrize(
    ("responses", "scores", "reason"),
    [
        (["a"], [1], "responses with fewer than 2 responses"),
        ([], [], "responses with fewer than 2 responses"),
        (None, [1, 2], "null responses"),
        (["a", "b"], None, "null scores"),
        (["a", "b"], [1], "scores of a different length than the responses"),
        (["a", "b"], [1, 2, 3], "scores of a different length than the responses"),
        (["a", None], [1, 2], "null response"),
        (["a", " "], [1, 2], "empty response"),
        (["a", 7], [1, 2], "response that is int, not text or messages"),
        (["a", [user("hi")]], [1, 2], "response that does not end with an assistant turn"),
        (["a", "b"], [1, None], "null number in scores"),
        (["a", "b"], [1, math.nan], "number in scores that is not finite"),
        (["a", "b"], [1, math.inf], "number in scores that is not finite"),
        (["a", "b"], [1, 1e39], "number in scores that is too large for 32 bits"),
        (["a", "b"], [1, True], "number in scores that is true or false, not a number"),
        (["a", "b"], [1, "good"], "number in scores that is not a number"),
        (["a", "b"], [[1], [2]], "number in scores that is not a number"),
        ("[1, 2", [1, 2], "responses that is not valid JSON"),
        ({"0": "a"}, [1, 2], "responses that is not a list"),
        (["a"] * 257, [1] * 257, "responses with more than 256 responses"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(responses: Any, scores: Any, reason: str) -> None:
    good = {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 2]}
    groups, dropped = read(good, {"prompt": "hi", "responses": responses, "scores": scores}, good)
    assert len(groups) == 2
    assert dropped.counts == {reason: 1}


def test_texts_need_a_prompt_unless_the_configuration_says_that_there_is_none() -> None:
    good = {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 2]}
    texts = {"responses": ["hi a", "hi b"], "scores": [0, 1]}
    groups, dropped = read(good, {**good, "prompt": None}, {**good, "prompt": " "}, texts)
    assert (len(groups), dropped.counts) == (1, {"text responses without prompt": 3})
    group = read_one(texts, prompt_key=None)
    assert (group.style, group.prompt, group.responses) == ("text", "", ["hi a", "hi b"])
