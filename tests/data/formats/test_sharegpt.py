"""ShareGPT: turns with `from` and `value`, in every place where messages may stand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.formats.rows import assistant, conversations, system, user, why


def said(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


CALL = {"name": "f", "arguments": {"x": None}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_conversations_with_their_prompt(write: Any) -> None:
    start = [said("system", "short"), said("human", "hi")]
    row = {"chosen": write([*start, said("gpt", "a")]), "rejected": write([*start, said("gpt", "b")])}
    assert conversations(row) == [[system("short"), user("hi"), assistant(text)] for text in "ab"]


@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_a_response_is_one_turn(write: Any) -> None:
    row = {"prompt": [said("human", "hi")], "chosen": write(said("gpt", "a")), "rejected": write(said("gpt", "b"))}
    assert conversations(row) == [[user("hi"), assistant("a")], [user("hi"), assistant("b")]]
    row = {"prompt": user("hi"), "chosen": write(assistant("a")), "rejected": write(assistant("b"))}
    assert conversations(row) == [[user("hi"), assistant("a")], [user("hi"), assistant("b")]]


def test_calls_and_observations_become_tool_calls_and_tool_turns() -> None:
    start = [said("human", "hi"), said("function_call", json.dumps(CALL)), said("observation", "2")]
    row = {"prompt": start, "chosen": said("gpt", "a"), "rejected": said("function_call", [CALL, CALL])}
    result = [user("hi"), CALLED, {"role": "tool", "content": "2"}]
    two = {**CALLED, "tool_calls": CALLED["tool_calls"] * 2}
    assert conversations(row) == [[*result, assistant("a")], [*result, two]]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (said("narrator", "x"), "chosen with an unknown role"),
        (said("gpt", None), "chosen with a message that has no text content"),
        (said("gpt", 7), "chosen with a message that has no text content"),
        (said("function_call", "f(x)"), "chosen that is not valid JSON"),
        (said("function_call", '{"name": "f"}'), "chosen with a function call without name and arguments"),
        (said("human", "x"), "chosen that does not end with an assistant turn"),
        ({"from": None, "value": "x"}, "chosen with a message that has no role"),
    ],
)
def test_a_turn_that_cannot_be_read_costs_its_row(turn: Any, reason: str) -> None:
    assert why({"prompt": "hi", "chosen": [turn], "rejected": "b"}) == reason


def test_fields_of_both_spellings_are_one_turn_as_parquet_writes_mixed_rows() -> None:
    none = {"role": None, "content": None, "from": None, "value": None}
    row = {
        "prompt": [none | said("human", "hi")],
        "chosen": [none | said("gpt", "a")],
        "rejected": [none | assistant("b")],
    }
    assert conversations(row) == [[user("hi"), assistant("a")], [user("hi"), assistant("b")]]


@pytest.mark.parametrize(
    "text", ['{"role": "admin", "content": "x"}', '{"role": "user"}', '{"role": cut', '{"value": 1}']
)
def test_json_that_is_no_message_stays_text(text: str) -> None:
    assert conversations({"prompt": "hi", "chosen": text, "rejected": "b"})[0][-1] == assistant(text)


def test_an_object_with_messages_stands_for_them() -> None:
    row = {"prompt": {"messages": [user("hi")]}, "chosen": {"messages": [assistant("a")]}, "rejected": "b"}
    assert conversations(row) == [[user("hi"), assistant("a")], [user("hi"), assistant("b")]]
