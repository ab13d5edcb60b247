"""What a case may look like, and what becomes of cases that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.core.models.base_chat_model import ChatMessage
from rm_gallery.errors import UserError
from tests.core.generator.exported import export, pairs_of

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in [("user", "Q"), ("assistant", "g"), ("assistant", "b")]
)
PAIR = {"prompt": "Q", "response_a": "b", "response_b": "g", "score_a": 1, "score_b": 3}
FORMS: dict[str, list[Any]] = {
    "pair": [PAIR],
    "pair in the other order": [{**PAIR, "response_a": "g", "response_b": "b", "score_a": 3, "score_b": 1}],
    "query": [{"query": "Q", **{name: value for name, value in PAIR.items() if name != "prompt"}}],
    "an empty prompt beside the query": [{**PAIR, "prompt": "", "query": "Q"}],
    "responses": [{"prompt": "Q", "responses": ["b", "g"], "scores": [1, 3]}],
    "responses as tuples": [{"prompt": "Q", "responses": ("b", "g"), "scores": (1, 3)}],
    "responses as arrays": [{"prompt": "Q", "responses": np.array(["b", "g"], object), "scores": np.array([1.0, 3.0])}],
    "rewards of a scored file": [{"prompt": "Q", "responses": ["b", "g"], "rewards": [-1.0, 1.0]}],
    "scored responses": [{"prompt": "Q", "responses": [{"response": "b", "score": 1}, {"response": "g", "score": 3}]}],
    "response with a list": [{"prompt": "Q", "response": ["b", "g"], "scores": [1, 3]}],
    "single responses": [{"prompt": "Q", "response": "b", "score": 1}, {"prompt": " Q\n", "response": "g", "score": 3}],
    "single with rewards": [{"prompt": "Q", "response": t, "reward": r} for t, r in (("b", -0.25), ("g", 1.75))],
    "lists of one": [{"prompt": "Q", "responses": [text], "scores": [score]} for text, score in (("b", 1), ("g", 3))],
    "numbers of all kinds": [{**PAIR, "score_a": Decimal(1), "score_b": np.float32(3)}],
    "numbers as text": [{**PAIR, "score_a": "1", "score_b": " 3.0"}],
    "lists as text": [{"prompt": "Q", "responses": '["b", "g"]', "scores": "[1, 3]"}],
    "results as scores": [{**PAIR, "score_a": GraderScore(score=1), "score_b": {"score": 3, "reason": "good"}}],
    "a table": [pd.DataFrame([PAIR])],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_pair(name: str, tmp_path: Path) -> None:
    cases = FORMS[name][0] if name == "a table" else FORMS[name]
    [row], summary = export(cases, tmp_path)
    assert (row["prompt"].strip(), row["chosen"], row["rejected"], row["margin"]) == ("Q", "g", "b", 2.0)
    assert (summary.num_failures, summary.ties, summary.unpaired) == (0, 0, 0)


@pytest.mark.parametrize(
    "cases",
    [
        [{"prompt": [USER], "response_a": [BAD], "response_b": [GOOD], "score_a": 1, "score_b": 3}],
        [{"prompt": USER, "response_a": BAD, "response_b": GOOD, "score_a": 1, "score_b": 3}],
        [{"messages": [USER], "responses": [BAD, GOOD], "scores": [1, 3]}],
        [{**PAIR, "prompt": json.dumps([USER]), "response_a": json.dumps([BAD]), "response_b": [GOOD]}],
        [{"response_a": [USER, BAD], "response_b": [USER, GOOD], "score_a": 1, "score_b": 3}],
        [{"prompt": "Q", "response_a": [USER, BAD], "response_b": [USER, GOOD], "score_a": 1, "score_b": 3}],
        [{"messages": [USER, answer], "score": score} for answer, score in ((BAD, 1), (GOOD, 3))],
        [{"response": [USER, answer], "score": score} for answer, score in ((BAD, 1), (GOOD, 3))],
        [{**PAIR, "prompt": (ChatMessage(**USER),), "response_a": [ChatMessage(**BAD)], "response_b": [GOOD]}],
    ],
)  # fmt: skip
def test_conversations_give_the_same_messages_however_they_are_given(cases: list[Any], tmp_path: Path) -> None:
    [row], _ = export(cases, tmp_path)
    assert row == {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 2.0}


def test_a_response_that_looks_like_a_conversation_in_part_keeps_its_own_turns(tmp_path: Path) -> None:
    other = {"role": "user", "content": "And now?"}
    cases = [
        {"prompt": "Q", "response_a": [BAD, other, GOOD], "response_b": [BAD, other, BAD], "score_a": 2, "score_b": 1}
    ]
    [row], _ = export(cases, tmp_path)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([USER, BAD, other], [GOOD], [BAD])


def test_pairs_without_a_prompt_have_no_such_column(tmp_path: Path) -> None:
    [row], _ = export([{"response_a": "b", "response_b": "g", "score_a": 1, "score_b": 3, "prompt": None}], tmp_path)
    assert row == {"chosen": "g", "rejected": "b", "margin": 2.0}


def test_ranks_make_pairs_without_a_margin(tmp_path: Path) -> None:
    rows, summary = export([{"prompt": "Q", "responses": ["c", "a", "b", "d"], "ranks": [3, 1, 2, 3]}], tmp_path)
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")
    }  # fmt: skip
    assert {row["margin"] for row in rows} == {None}
    assert summary.ties == 1


def test_sources_come_from_the_case_or_the_option(tmp_path: Path) -> None:
    cases = [{**PAIR, "prompt": "one", "source": "helpful"}, {**PAIR, "prompt": "two", "source": ""}, PAIR]
    rows, _ = export(cases, tmp_path, source="rest")
    assert {row["prompt"]: row["source"] for row in rows} == {"one": "helpful", "two": "rest", "Q": "rest"}
    singles = [
        {"prompt": "Q", "response": text, "score": n, "source": text[0]} for n, text in enumerate(("x1", "x2", "y"))
    ]
    rows, _ = export(singles, tmp_path)
    assert {(row["chosen"], row["source"]) for row in rows} == {("x2", "x"), ("y", None)}


@pytest.mark.parametrize(
    ("mapper", "case"),
    [
        ({"prompt": "q", "response_a": "out.0", "response_b": "out.1", "score_a": "s.a", "score_b": "s.b"},
         {"q": "Q", "out": ["b", "g"], "s": {"a": 1, "b": 3}}),
        ({"prompt": "input.text", "responses": "out"}, {"input": {"text": "Q"}, "out": ["b", "g"], "scores": [1, 3]}),
        ({"responses": "out.text", "scores": "out.grade"},
         {"query": "Q", "response": "other", "out": [{"text": "b", "grade": 1}, {"text": "g", "grade": 3}]}),
        ({"ranks": "places"}, {"query": "Q", "responses": ["b", "g"], "scores": [9, 1], "places": [2, 1]}),
        (lambda case: {"prompt": case["q"], "responses": case["out"], "scores": [1, 3]}, {"q": "Q", "out": ["b", "g"]}),
    ],
)  # fmt: skip
def test_a_mapper_says_where_the_fields_are(mapper: Any, case: dict[str, Any], tmp_path: Path) -> None:
    [row], _ = export([case], tmp_path, mapper=mapper)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Q", "g", "b")


@pytest.mark.parametrize(
    ("mapper", "what"),
    [
        ({"promt": "q"}, "'promt'.*Did you mean 'prompt'"),
        ({"prompt": 3}, "both must be strings"),
        ("prompt", "the mapper is a string"),
        (dict, "the mapper is"),
    ],
)
def test_a_mapper_that_cannot_be_is_refused(mapper: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        export_data([PAIR], tmp_path, mapper=mapper)


SCORES: list[tuple[Any, str]] = [
    (None, "null score"),
    (float("nan"), "score that is not finite"),
    (np.float64("nan"), "score that is not finite"),
    (float("inf"), "score that is not finite"),
    (-float("inf"), "score that is not finite"),
    (Decimal("sNaN"), "score that is not finite"),
    (10**400, "score that is not finite"),
    (1e200, "score that is too large for 32 bits"),
    (True, "score that is true or false, not a number"),
    (np.bool_(False), "score that is true or false, not a number"),
    ("4/5", "score that is not a number"),
    ([4], "score that is not a number"),
    (1j, "score that is not a number"),
    (pd.NA, "null score"),
    ({"reason": "good"}, "null score"),
    (GraderError(error="timeout"), "an error of the grader instead of a score"),
    ({"error": "timeout"}, "an error of the grader instead of a score"),
    (GraderRank(rank=[1]), "null score"),
    (GraderScore.model_construct(score=float("nan")), "score that is not finite"),
]


@pytest.mark.parametrize(("score", "reason"), SCORES)
def test_a_score_that_is_none_is_counted_once_and_costs_only_its_response(
    score: Any, reason: str, tmp_path: Path
) -> None:
    cases = [
        {**PAIR, "prompt": "spoilt", "score_b": score},
        {"prompt": "three", "responses": ["x", "y", "z"], "scores": [2, score, 1]},
        PAIR,
    ]
    rows, summary = export(cases, tmp_path)
    assert {(row["chosen"], row["rejected"]) for row in rows} == {("x", "z"), ("g", "b")}
    assert summary.failures == {reason: 2}
    assert summary.examples[reason].startswith("cases:0")
    assert summary.num_cases == 3


RESPONSES: list[tuple[Any, str]] = [
    (None, "null response"),
    (float("nan"), "null response"),
    ("", "empty response"),
    (" \n", "empty response"),
    ([], "empty response"),
    (7, "response that is int, not text or messages"),
    (b"bytes", "response that is bytes, not text or messages"),
    ({"content": "no role"}, "response that is dict, not text or messages"),
    ([{"content": "no role"}], "response with a message that has no role"),
    ([{"role": "assistant", "content": 3}], "response with a message that has no text content"),
    ([USER], "response that does not end with an assistant turn"),
    ([{"role": "assistant", "content": " "}], "empty response"),
    ([{"role": "assistant", "content": "x", "when": object()}], "response with a value that is not JSON"),
    ([{"role": "assistant", "content": "x", "grade": float("nan")}], "response with a value that is not JSON"),
    ('[{"role": "assistant", "content": ', "response with a list of messages that is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "reason"), RESPONSES)
def test_a_response_that_cannot_be_used_is_counted(response: Any, reason: str, tmp_path: Path) -> None:
    cases = [{"prompt": "three", "responses": ["x", response, "z"], "scores": [2, 5, 1]}, PAIR]
    assert pairs_of(cases, tmp_path) == {("x", "z"), ("g", "b")}
    assert export(cases, tmp_path)[1].failures == {reason: 1}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def ring() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


CASES: list[tuple[Any, str]] = [
    (None, "a case that is NoneType, not a dictionary"),
    (7, "a case that is int, not a dictionary"),
    ([1, 2], "a case that is list, not a dictionary"),
    ({}, "no response_a and response_b, responses or response .first: cases:0: the fields are none."),
    ({"prompt": "Q", "output": "x"}, "no response_a and response_b.*: the fields are prompt, output"),
    ({**PAIR, "prompt": 7}, "prompt that is int"),
    ({**PAIR, "prompt": [{"role": 3}]}, "prompt with a message that has no role"),
    ({"prompt": "Q", "responses": None, "scores": [1]}, "null responses"),
    ({"prompt": "Q", "responses": [], "scores": []}, "empty responses"),
    ({"prompt": "Q", "responses": "a", "scores": [1]}, "responses that is not valid JSON"),
    ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "scores of a different length than the responses"),
    ({"prompt": "Q", "responses": ["a", "b"], "scores": 1}, "scores that is not a list"),
    ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1]}, "ranks of a different length than the responses"),
    ({"response": "a", "score": 1}, "a single response without a prompt"),
    ({"prompt": "  ", "response": "a", "score": 1}, "a single response without a prompt"),
    ({**PAIR, "prompt": "\ud83d"}, "lone surrogate"),
    ({**PAIR, "response_b": "\udc00"}, "lone surrogate"),
    ({**PAIR, "source": "\udc00"}, "lone surrogate"),
    ({**PAIR, "prompt": [{**USER, "extra": nested(10_000)}]}, "nested more than 100 deep"),
    ({**PAIR, "prompt": [{**USER, "extra": ring()}]}, "nested more than 100 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "reason"), CASES)
def test_a_case_that_cannot_be_used_is_counted_and_is_an_error_where_there_is_no_other(
    case: Any, reason: str, tmp_path: Path
) -> None:
    _, summary = export([PAIR, case], tmp_path)
    [(found, count)] = summary.failures.items()
    assert count == 1 and summary.num_rows == 1
    with pytest.raises(UserError, match=reason) as caught:
        export_data([case], tmp_path / "none")
    assert "\n" not in str(caught.value) and "first: cases:0" in str(caught.value)
    assert found in str(caught.value)
    assert not (tmp_path / "none").exists()


DAMAGE: list[Any] = [
    None, "", " \n", 0, -1.5, float("nan"), float("inf"), True, b"x", 10**500, 1j, [], {}, [None], [[]], [{}], (1, 2),
    {1}, {"role": None}, [{"role": "assistant"}], [{"role": "assistant", "content": None, "tool_calls": []}],
    [{"role": "assistant", "content": "x", 3: "y"}], [{"role": "assistant", "content": "x", "y": {1: 2, "b": 3}}],
    "\ud800", "a\0b", "[" * 20_000, '[{"role": "assistant", "content": "\\ud800"}]', np.array([1, 2]), np.array(3.0),
    np.nan, pd.NA, pd.NaT, pd.Series([1, 2]), pd.DataFrame({"a": [1]}), range(3), iter("ab"), object, object(),
    ValueError("x"), Decimal("NaN"), GraderError(error="e"), GraderScore(score=1), GraderRank(rank=[1, 2]),
    {"score": float("nan")}, {"rank": "ab", "metadata": 3}, {"response": "x", "score": 2}, [{"response": "x"}],
    nested(500),
]  # fmt: skip
WHOLE: list[dict[str, Any]] = [
    {**PAIR, "source": "s"},
    {"query": "Q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]},
    {"messages": [USER], "responses": ["a", "b"], "ranks": [1, 2]},
    {"prompt": "Q", "response": "r", "score": 3},
    {"messages": [USER, GOOD], "reward": 2},
]


def test_damage_at_any_place_costs_no_other_case(tmp_path: Path) -> None:
    damaged = [{**case, field: value} for case in WHOLE for field in case for value in DAMAGE]
    good = [{**PAIR, "prompt": f"good {n}", "source": "good"} for n in range(5)]
    rows, summary = export([*damaged, *good], tmp_path)
    assert len(damaged) > 800 and summary.num_cases == len(damaged) + 5
    kept = [row for row in rows if row["source"] == "good"]
    assert sorted(row["prompt"][0]["content"] for row in kept) == [f"good {n}" for n in range(5)]
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"], row["margin"]) for row in kept} == {
        ("g", "b", 2)
    }
    assert summary.num_failures > 700 and all(reason and "\n" not in reason for reason in summary.failures)


@pytest.mark.parametrize(
    ("mapper", "reason"),
    [
        ({"prompt": "q"}, "nothing at 'q', the mapper's path of prompt"),
        (lambda case: case["q"], "the mapper failed with KeyError .first: cases:0: 'q'."),
        (lambda case: [case], "the mapper gave list, not a dictionary"),
    ],
)
def test_a_mapper_that_does_not_fit_a_case_is_counted(mapper: Callable[..., Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"1 dropped: {reason}"):
        export_data([PAIR], tmp_path, mapper=mapper)


@pytest.mark.parametrize(
    ("cases", "what"),
    [
        ([], "no cases given"),
        (iter(()), "no cases given"),
        ({"relevance": [GraderScore(score=1)]}, "one dictionary.*results=..."),
        (7, "of type int"),
        (b"cases", "of type bytes"),
        (None, "cases and eval_cases are not set"),
    ],
)
def test_what_is_no_list_of_cases_is_refused(cases: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        export_data(cases, tmp_path)


def test_an_iterator_is_read_once(tmp_path: Path) -> None:
    assert pairs_of(({**PAIR, "prompt": str(n)} for n in range(3)), tmp_path) == {("g", "b")}
