"""Prompts: every column that may hold the prompt, and the turns before it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rm_gallery.data.formats import ResponsesConfig, RowReader, choose_format
from tests.data.formats.rows import assistant, conversations, numbered, read, read_one, system, user, why

PAIR = {"chosen": "a", "rejected": "b"}
HI = [user("hi")]


def both(before: list[Any]) -> list[list[Any]]:
    return [[*before, assistant(text)] for text in "ab"]


def scored(row: dict[str, Any]) -> list[list[Any]]:
    """The conversations that scoring reads."""
    config, rows = ResponsesConfig(), numbered(row)
    group = RowReader(config, choose_format(rows, config).name, has_chat_template=True).read(rows[0])
    return [[*group.prompt, *response] for response in group.responses]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("columns", "before"),
    [
        ({"prompt": "hi"}, HI),
        ({"instruction": "hi"}, HI),
        ({"instruction": "hi", "input": ""}, HI),
        ({"instruction": "hi", "input": None}, HI),
        ({"instruction": "Add.", "input": "1 2"}, [user("Add.\n1 2")]),
        ({"question": "hi"}, HI),
        ({"query": "hi"}, HI),
        ({"input": "hi"}, HI),
        ({"context": "hi"}, HI),
        ({"history": "hi"}, HI),
        ({"messages": HI}, HI),
        ({"messages": json.dumps(HI)}, HI),
        ({"messages": [*HI, assistant("a")]}, HI),
        ({"conversations": [{"from": "human", "value": "hi"}]}, HI),
        ({"conversation": HI}, HI),
        ({"trajectory": [{"from": "user", "value": "hi"}]}, HI),
        ({"input": {"messages": HI, "parallel_tool_calls": True}}, HI),
        ({"prompt": None, "question": "hi"}, HI),
        ({"prompt": " ", "question": "hi"}, HI),
        ({"prompt": "hi", "question": "other"}, HI),
        ({"system": "s", "prompt": "hi"}, [system("s"), *HI]),
        ({"system": "", "prompt": "hi"}, HI),
        ({"system": None, "prompt": "hi"}, HI),
        ({"system": "s", "prompt": [system("s"), *HI]}, [system("s"), *HI]),
        ({"system": system("s"), "question": "hi"}, [system("s"), *HI]),
        ({"history": [["q", "r"]], "prompt": "hi"}, [user("q"), assistant("r"), *HI]),
        ({"history": json.dumps([["q", "r"]]), "prompt": "hi"}, [user("q"), assistant("r"), *HI]),
        ({"history": [user("q"), assistant("r")], "prompt": "hi"}, [user("q"), assistant("r"), *HI]),
        ({"history": [], "prompt": "hi"}, HI),
        (
            {"system": "s", "history": [["q", "r"]], "instruction": "Add.", "input": "1"},
            [system("s"), user("q"), assistant("r"), user("Add.\n1")],
        ),
    ],
)  # fmt: skip
def test_the_prompt_is_read_in_training_and_scoring(columns: dict[str, Any], before: list[Any]) -> None:
    for write in (lambda text: text, assistant, lambda text: [assistant(text)]):
        row = columns | {name: write(text) for name, text in PAIR.items()}
        assert conversations(row) == both(before)
        assert scored(row) == both(before)


def test_the_prompt_of_rankings_and_single_responses_is_read_too() -> None:
    before = [system("s"), *HI]
    assert conversations({"system": "s", "question": "hi", "responses": ["a", "b"], "scores": [1, 0]}) == both(before)
    assert scored({"system": "s", "query": "hi", "responses": ["a", "b"]}) == both(before)
    assert scored({"system": "s", "query": "hi", "response": "a"}) == both(before)[:1]
    assert scored({"messages": HI, "response": "a"}) == both(HI)[:1]
    assert scored({"messages": [*HI, assistant("a")], "response": "x", "system": "s"}) == both(before)[:1]
    assert scored({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]}) == both(HI)[:1]


def test_a_conversation_has_its_own_prompt() -> None:
    whole = {"chosen": [*HI, assistant("a")], "rejected": [*HI, assistant("b")]}
    assert conversations({**whole, "question": "another", "instruction": "third"}) == both(HI)
    assert conversations({**whole, "system": "s"}) == both([system("s"), *HI])
    with_system = {name: [system("s"), *turns] for name, turns in whole.items()}
    assert conversations({**with_system, "system": "s"}) == both([system("s"), *HI])


def test_texts_that_contain_their_prompt_stay_raw_texts() -> None:
    row = {"question": "Why is it so?", "chosen": "Q: Why is it so? A: a", "rejected": "Q: Why is it so? A: b"}
    group = read_one(row)
    assert (group.style, group.prompt, group.responses) == ("text", "", [row["chosen"], row["rejected"]])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"system": "s", "prompt": [system("t"), *HI]}, "system that differs from the system turn of the conversation"),
        ({"system": HI, "prompt": "hi"}, "system with a turn of another role"),
        ({"history": [["q"]], "prompt": "hi"}, "history that has neither messages nor pairs of texts"),
        ({"history": [["q", None]], "prompt": "hi"}, "history that has neither messages nor pairs of texts"),
        ({"history": ["q", "r"], "prompt": "hi"}, "history that has neither messages nor pairs of texts"),
        ({"history": [{"q": "r"}], "prompt": "hi"}, "history with a message that has no role"),
        ({"messages": [*HI, assistant("c")]}, "messages that end with an assistant turn, before the response"),
        ({"instruction": "Add.", "input": HI}, "input with messages, after the text of instruction"),
    ],
)
def test_a_prompt_that_cannot_be_read_costs_its_row(columns: dict[str, Any], reason: str) -> None:
    assert why(columns | PAIR) == reason


def test_each_row_has_the_prompt_of_its_own_columns() -> None:
    groups, dropped = read({"prompt": "hi", **PAIR}, {"question": "hi", **PAIR}, {"id": 7, **PAIR})
    assert [[*group.prompt, *group.responses[0]] for group in groups] == [both(HI)[0]] * 2  # type: ignore[list-item]
    assert dropped.counts == {"text responses without prompt": 1}


def test_names_can_be_changed_and_null_reads_no_such_column() -> None:
    row = {"task": "hi", "sys": "s", "past": [["q", "r"]], "more": "x", "system": "t", "question": "no", **PAIR}
    names = {"prompt_key": "task", "system_key": "sys", "history_key": "past"}
    assert conversations(row, **names) == both([system("s"), user("q"), assistant("r"), *HI])
    assert conversations({"task": "Add.", **row}, instruction="task", input="more", system_key=None)[0][0] == user(
        "hi\nx"
    )
    assert read_one(row, prompt_key=None, system_key=None).style == "text"


def test_tools_of_openai_come_with_the_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"input": {"messages": HI, "tools": tools}, "preferred_output": [assistant("a")]}
    group = read_one({**row, "non_preferred_output": [assistant("b")]})
    assert group.metadata == {"tools": tools}
    assert [[*group.prompt, *response] for response in group.responses] == both(HI)  # type: ignore[list-item]
