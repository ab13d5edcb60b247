"""Nested responses: every way in which a record says how good its response is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.data.formats.rows import assistant, conversations, only, order, read, read_one, user, why


def row(*output: Any, **more: Any) -> dict[str, Any]:
    return {"input": [user("hi")], "output": list(output), **more}


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"answer": {"role": "assistant", "content": text, **fields}}


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"label": "rejected"}, {"label": "chosen"}),
        ({"label": "Rejected "}, {"label": "Chosen"}),
        ({"label": False}, {"label": True}),
        ({"label": 0}, {"label": 1}),
        ({"label": {"is_preferred": False}}, {"label": {"is_preferred": True}}),
        ({"label": {"preference": "rejected"}}, {"label": {"preference": "chosen"}}),
        ({"label": {"preference_score": -1}}, {"label": {"preference_score": 2}}),
        ({"label": {"response_type": "A", "score": 1}}, {"label": {"response_type": "B", "score": 2}}),
        ({"is_preferred": False}, {"is_preferred": True}),
        ({"preference": "rejected"}, {"preference": "chosen"}),
        ({"score": "1.5"}, {"score": "2.5"}),
        ({"reward": 0.1}, {"reward": 0.2}),
        ({"reward": {"total_score": 1}}, {"reward": {"total_score": 4}}),
        ({"label": None, "score": 1}, {"label": None, "score": 2}),
        # equal flags say nothing, so the scores decide
        ({"is_preferred": False, "score": 1}, {"is_preferred": False, "score": 2}),
    ],
)
def test_labels_and_scores_say_which_response_is_better(bad: dict[str, Any], good: dict[str, Any]) -> None:
    for nested in (
        row(answer("no", **bad), answer("yes", **good)),
        row({"content": "no", **bad}, {"content": "yes", **good}),
        row({"answer": {"content": "no"}, **bad}, {"answer": {"content": "yes"}, **good}),
        row({"answer": "no", **bad}, {"answer": "yes", **good}),
    ):
        assert order(read_one(nested)) == [(1, 0)]
        assert conversations(nested) == [[user("hi"), assistant("no")], [user("hi"), assistant("yes")]]


@pytest.mark.parametrize("key", ["content", "text", "response"])
def test_the_text_of_a_response_has_several_names(key: str) -> None:
    nested = row({key: "no", "label": 0}, {key: "yes", "label": 1})
    assert conversations(nested) == [[user("hi"), assistant("no")], [user("hi"), assistant("yes")]]


def test_a_preferred_response_and_the_overall_preference_give_order_and_margin() -> None:  # HelpSteer3 in this form
    labels = [{"is_preferred": preferred, "preference_score": -2, "response_type": "A"} for preferred in (True, False)]
    pair = only(read_one(row(answer("yes", label=labels[0]), answer("no", label=labels[1]))))
    assert (pair.better, pair.worse, pair.margin) == (0, 1, 2)


def test_a_label_wins_over_scores_and_scores_that_agree_are_its_margin() -> None:
    agree = row({"content": "a", "label": "chosen", "score": 4}, {"content": "b", "label": "rejected", "score": 1})
    assert (order(read_one(agree)), only(read_one(agree)).margin) == ([(0, 1)], 3)
    differ = row({"content": "a", "label": "chosen", "score": 1}, {"content": "b", "label": "rejected", "score": 4})
    assert (order(read_one(differ)), only(read_one(differ)).margin) == ([(0, 1)], None)


def test_input_is_text_or_messages_and_all_of_it_may_be_json() -> None:
    output = [answer("no", label=0), answer("yes", label=1)]
    for prompt in ("hi", [user("hi")], json.dumps([user("hi")]), user("hi")):
        for written in (output, json.dumps(output)):
            assert conversations({"input": prompt, "output": written})[1] == [user("hi"), assistant("yes")]


def test_a_response_may_call_tools_hold_parts_or_be_a_conversation() -> None:
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    nested = row(
        answer("", tool_calls=calls, label=1), answer("no", label=0), {"content": parts, "label": 2},
        {"content": [user("more?"), assistant("yes")], "label": 3},
    )  # fmt: skip
    assert [turns[1:] for turns in conversations(nested)] == [
        [{"role": "assistant", "content": "", "tool_calls": calls}],
        [assistant("no")],
        [assistant("in parts")],
        [user("more?"), assistant("yes")],
    ]


def test_more_than_two_responses_are_all_compared() -> None:
    flags = row(*(answer(text, label=text == "b") for text in "abc"))
    assert order(read_one(flags)) == [(1, 0), (1, 2)]
    scores = row(*(answer(text, score=score) for text, score in zip("abc", (1, 1, 2), strict=True)))
    assert order(read_one(scores)) == [(2, 0), (2, 1)]


def test_the_field_of_the_score_can_be_named() -> None:
    nested = row({"content": "a", "score": 1, "stars": 5}, {"content": "b", "score": 2, "stars": 3})
    assert order(read_one(nested)) == [(1, 0)]
    assert (order(read_one(nested, score="stars")), only(read_one(nested, score="stars")).margin) == ([(0, 1)], 2)
    assert why(nested, score="points") == "null points in output"


def test_completions_of_ultrafeedback_are_read_by_their_fine_grained_score() -> None:
    completions = [
        {"model": "m", "response": "a", "overall_score": 10.0, "fine-grained_score": 1.5, "critique": "..."},
        {"model": "n", "response": "b", "overall_score": 7.0, "fine-grained_score": 4.5, "critique": "..."},
    ]
    group = read_one({"instruction": "hi", "source": "evol", "completions": completions, "models": ["m", "n"]})
    assert (order(group), only(group).margin, group.source, group.prompt) == ([(1, 0)], 3, "evol", [user("hi")])
    assert order(read_one({"prompt": "hi", "completions": completions}, score="overall_score")) == [(0, 1)]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (None, "null output"),
        ([answer("a", label=1)], "output with fewer than 2 responses"),
        ([answer("a", label=1), "b"], "output with a response that is not a record"),
        ([answer("a", label=1), None], "output with a response that is not a record"),
        ([answer("a", label=1), answer("b")], "output with a response that has no label or score"),
        ([answer("a", label="A"), answer("b", label="B")], "output with a response that has no label or score"),
        ([answer("a", label=True), answer("b")], "output with a response that has no label or score"),
        ([answer("a", label=True), answer("b", label=0.5)], "output with a response that has no label or score"),
        ([answer("a", label=True), answer("b", label=True)], "all labels in output equal"),
        ([answer("a", label=2), answer("b", label=2)], "all labels or scores in output equal"),
        ([answer("a", score=1), answer("b", score=math.nan)], "score in output that is not finite"),
        ([{"label": 1}, {"label": 0}], "output with a response that has no text"),
        ([answer("a", label=1), answer("", label=0)], "empty response"),
        ([answer("a", label=1), {"answer": {"role": "user", "content": "b", "label": 0}}],
         "response that does not end with an assistant turn"),
        ([answer("a", label=1), answer("b", role="bot", label=0)], "response with an unknown role"),
        ("[{]", "output that is not valid JSON"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(output: Any, reason: str) -> None:
    good = row(answer("a", label=1), answer("b", label=0))
    groups, dropped = read(good, {"input": "hi", "output": output})
    assert len(groups) == 1
    assert dropped.counts == {reason: 1}


def test_texts_need_the_prompt_that_they_answer() -> None:
    nested = row(answer("a", label=1), answer("b", label=0))
    assert why({**nested, "input": ""}) == "text responses without input"
    completions = {"completions": nested["output"]}
    assert why({"instruction": None, **completions}) == "text responses without instruction"
    assert why(completions) == "text responses without prompt"
    assert read_one(completions, prompt_key=None).style == "text"
