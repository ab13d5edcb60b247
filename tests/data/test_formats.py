"""Formats: every shape of a row becomes the conversation that its author meant, or a counted reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rm_gallery.data.dropped import Dropped
from rm_gallery.data.formats import FormatConfig, read_groups
from rm_gallery.data.source import Row
from rm_gallery.errors import UserError
from rm_gallery.schema import Message, PreferenceGroup


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def read(*rows: dict[str, Any], template: bool = True, **options: Any) -> tuple[list[PreferenceGroup], Dropped]:
    dropped = Dropped()
    numbered = [Row(values, "a.parquet", number) for number, values in enumerate(rows)]
    groups = read_groups(numbered, FormatConfig(**options), has_chat_template=template, dropped=dropped)
    return list(groups), dropped


def read_one(row: dict[str, Any], **options: Any) -> PreferenceGroup:
    groups, dropped = read(row, **options)
    assert not dropped.counts
    return groups[0]


def conversations(row: dict[str, Any], **options: Any) -> list[list[Message]]:
    """Both whole conversations of a row."""
    group = read_one(row, **options)
    assert group.style == "chat"
    return [[*group.prompt, *response] for response in group.responses]  # type: ignore[list-item]


def why(row: dict[str, Any], **options: Any) -> str:
    """The reason for which a row is left out."""
    groups, dropped = read(row, **options)
    assert not groups
    assert dropped.total == 1
    assert list(dropped.examples.values()) == ["a.parquet:0"]
    return next(iter(dropped.counts))


QUESTION = [system("short"), user("1 + 1?")]
GOOD, BAD = [*QUESTION, assistant("2")], [*QUESTION, assistant("3")]


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, lambda turns: json.dumps(turns, indent=2)])
def test_message_lists_and_their_json_read_the_same(write: Any) -> None:
    assert conversations({"chosen": write(GOOD), "rejected": write(BAD)}) == [GOOD, BAD]


@pytest.mark.parametrize(
    "prompt", [QUESTION, json.dumps(QUESTION), [user("1 + 1?")], QUESTION[1:]], ids=["list", "json", "tail", "turn"]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_prompt_column_and_whole_conversations_give_each_turn_once(prompt: Any, whole: bool) -> None:
    if whole:
        row = {"prompt": prompt, "chosen": GOOD, "rejected": BAD}
    else:
        row = {"prompt": QUESTION, "chosen": [assistant("2")], "rejected": [assistant("3")]}
    assert conversations(row) == [GOOD, BAD]


def test_a_prompt_string_that_the_conversations_repeat_stands_there_once() -> None:  # as in ultrafeedback_binarized
    chosen, rejected = [user("hi"), assistant("hello")], [user("hi"), assistant("no")]
    assert conversations({"prompt": "hi", "chosen": chosen, "rejected": rejected}) == [chosen, rejected]


def test_system_turns_of_the_prompt_stay_when_responses_begin_with_the_question() -> None:
    row = {"prompt": QUESTION, "chosen": GOOD[1:], "rejected": BAD[1:]}
    assert conversations(row) == [GOOD, BAD]


def test_earlier_turns_of_the_prompt_stay_when_responses_begin_with_the_last_question() -> None:
    before = [user("a"), assistant("b"), user("c")]
    row = {"prompt": before, "chosen": [user("c"), assistant("d")], "rejected": [user("c"), assistant("e")]}
    assert conversations(row) == [[*before, assistant("d")], [*before, assistant("e")]]


def test_a_later_turn_that_equals_the_prompt_does_not_drop_the_prompt() -> None:
    later = [user("go on"), assistant("z")]
    row = {"prompt": [user("go on")], "chosen": [assistant("x"), *later], "rejected": [assistant("y"), *later]}
    assert conversations(row) == [
        [user("go on"), assistant("x"), *later],
        [user("go on"), assistant("y"), *later],
    ]


def test_a_prompt_that_only_one_response_repeats_stands_once_in_both() -> None:
    row = {"prompt": QUESTION, "chosen": GOOD, "rejected": [assistant("3")]}
    assert conversations(row) == [GOOD, BAD]


def test_a_string_prompt_with_string_responses_is_a_chat_where_there_is_a_template() -> None:
    row = {"prompt": "hi", "chosen": "hello", "rejected": "no"}
    assert conversations(row) == [[user("hi"), assistant("hello")], [user("hi"), assistant("no")]]
    group = read_one(row, template=False)
    assert (group.style, group.prompt, group.responses) == ("text", "hi", ["hello", "no"])


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": []}])
def test_strings_without_a_prompt_are_bare_texts(prompt: dict[str, Any]) -> None:
    group = read_one({**prompt, "chosen": "Q: hi A: hello", "rejected": "Q: hi A: no"})
    assert (group.style, group.prompt, group.responses) == ("text", "", ["Q: hi A: hello", "Q: hi A: no"])


def test_input_style_decides_where_auto_would_not() -> None:
    row = {"chosen": "hello", "rejected": "no"}
    assert conversations(row, input_style="chat") == [[assistant("hello")], [assistant("no")]]
    assert read_one({"prompt": "hi ", **row}, input_style="text").style == "text"


@pytest.mark.parametrize(
    "text", ['[{"a": 1}]', '[{"name": "Bo", "role": "dev"}]', "[1, 2]", "[{ not json", "{}", '[["role"]]', "[]"]
)
def test_json_that_is_no_list_of_messages_stays_text(text: str) -> None:
    assert read_one({"chosen": text, "rejected": "other"}).responses[0] == text


def test_null_fields_of_a_message_are_left_out() -> None:
    chosen = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "x", "name": "a"}]
    row = {"chosen": chosen, "rejected": [assistant("y")]}
    assert conversations(row)[0] == [user("hi"), {"role": "assistant", "content": "x", "name": "a"}]


def test_a_tool_call_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert len(conversations({"chosen": [user("hi"), call], "rejected": [user("hi"), assistant("y")]})) == 2


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (None, "null chosen"),
        ("", "empty chosen"),
        (" \n", "empty chosen"),
        ([], "empty chosen"),
        ([user("hi"), assistant(" ")], "empty chosen"),
        ("no", "chosen equal to rejected"),
        ([{"role": None, "content": "x"}], "chosen with a message that has no role"),
        ([{"content": "x"}], "chosen with a message that has no role"),
        ([None, assistant("x")], "chosen with a message that has no role"),
        ([{"role": "assistant", "content": None}], "chosen with a message that has no text content"),
        ([{"role": "assistant", "content": [{"type": "text"}]}], "chosen with a message that has no text content"),
        ([assistant("x"), user("bye")], "chosen that does not end with an assistant turn"),
        (json.dumps(GOOD)[:-4], "chosen with a list of messages that is not valid JSON"),
        (str(GOOD), "chosen with a list of messages that is not valid JSON"),
        (json.dumps([*QUESTION, {"content": "x"}]), "chosen with a message that has no role"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(chosen: Any, reason: str) -> None:
    assert why({"chosen": chosen, "rejected": "no"}) == reason


def test_messages_under_style_text_are_left_out() -> None:
    assert why({"chosen": GOOD, "rejected": BAD}, input_style="text") == "messages under data.input_style=text"


def test_a_pair_equal_across_spellings_is_left_out() -> None:
    assert why({"chosen": GOOD, "rejected": json.dumps(GOOD, indent=1)}) == "chosen equal to rejected"


def test_bad_rows_error_stops_at_the_first_bad_row() -> None:
    good = {"chosen": "a", "rejected": "b"}
    with pytest.raises(UserError) as error:
        read(good, {"chosen": None, "rejected": "b"}, bad_rows="error")
    assert str(error.value) == "a.parquet:1: null chosen; mend the row, or set data.bad_rows=drop to leave it out"


def test_dropped_rows_are_counted_by_reason_with_the_first_of_each() -> None:
    null, same, good = {"chosen": None, "rejected": "b"}, {"chosen": "a", "rejected": "a"}, {"chosen": "a"}
    groups, dropped = read({**good, "rejected": "b"}, same, null, null)
    assert len(groups) == 1
    assert dropped.describe() == (
        "2 null chosen (first: a.parquet:2), 1 chosen equal to rejected (first: a.parquet:1)"
    )  # fmt: skip


def test_many_reasons_are_summed_up() -> None:
    dropped = Dropped()
    for number in range(30):
        dropped.add(f"reason {number:02}", "a:0")
    assert dropped.describe(limit=1) == "1 reason 00 (first: a:0), 29 for 29 other reasons"


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (1, "int"), (1.5, "float"), (True, "bool"), (b"x", "bytes"), ({"role": "user", "content": "x"}, "dict"),
        (["x"], "lists of str"), ([[("role", "user")]], "lists of list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_a_column_of_another_type_is_an_error_not_a_dropped_row(name: str, value: Any, held: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError) as error:
        read({**row, name: None}, {**row, name: value})
    assert str(error.value) == (
        f"a.parquet:1: column {name!r} holds {held}, not text or messages; "
        f"write it as strings or name another column with data.{name}_key"
    )


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    with pytest.raises(UserError) as error:
        read({"choosen": "a", "rejected": "b"})
    assert str(error.value) == (
        "a.parquet: no column 'chosen' (columns: choosen, rejected); rename it or set data.chosen_key."
        " Did you mean 'choosen'?"
    )


def test_a_prompt_column_must_exist_once_it_is_named() -> None:
    with pytest.raises(UserError, match=r"no column 'question' \(columns: chosen, rejected\); .*data\.prompt_key"):
        read({"chosen": "a", "rejected": "b"}, prompt_key="question")


def test_prompt_key_null_reads_no_prompt() -> None:
    group = read_one({"prompt": "Q", "chosen": "Q a", "rejected": "Q b"}, prompt_key=None)
    assert (group.prompt, group.style) == ("", "text")
