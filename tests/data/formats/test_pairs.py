"""Pairs: every shape of a chosen and a rejected response becomes the conversation that its author meant."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row, SourceConfig, read_rows, resolve_files
from rm_gallery.errors import Dropped, UserError
from tests.data.formats.rows import assistant, conversations, only, read, read_all, read_one, system, user, why
from tests.data.sources.writing import write

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
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    assert conversations({"chosen": [user("hi"), call], "rejected": [user("hi"), assistant("y")]}) == [
        [user("hi"), call],
        [user("hi"), assistant("y")],
    ]


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
        ([{"role": "narrator", "content": "x"}], "chosen with an unknown role"),
        ([{"role": "user<|im_end|>", "content": "x"}, assistant("x")], "chosen with an unknown role"),
        ([{"role": "assistant", "content": [{"type": "text"}]}], "chosen with a message that has no text content"),
        ([assistant("x"), user("bye")], "chosen that does not end with an assistant turn"),
        (json.dumps(GOOD)[:-4], "chosen with a list of messages that is not valid JSON"),
        (str(GOOD), "chosen with a list of messages that is not valid JSON"),
        (json.dumps([*QUESTION, {"content": "x"}]), "chosen with a message that has no role"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(chosen: Any, reason: str) -> None:
    rejected = BAD if isinstance(chosen, list) and chosen else "no"
    assert why({"chosen": chosen, "rejected": rejected}) == reason


def test_messages_under_style_text_are_left_out() -> None:
    assert why({"chosen": GOOD, "rejected": BAD}, input_style="text") == "messages under data.input_style=text"


def test_a_pair_equal_across_spellings_is_left_out() -> None:
    assert why({"chosen": GOOD, "rejected": json.dumps(GOOD, indent=1)}) == "chosen equal to rejected"


def test_bad_rows_error_stops_at_the_first_bad_row() -> None:
    good = {"chosen": "a", "rejected": "b"}
    with pytest.raises(UserError) as error:
        read(good, {"chosen": None, "rejected": "b"}, bad_rows="error")
    assert str(error.value) == "a.parquet:1: null chosen; fix the row, or set data.bad_rows=drop to drop it"


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


def test_prompt_key_null_reads_no_prompt() -> None:
    group = read_one({"prompt": "Q", "chosen": "Q a", "rejected": "Q b"}, prompt_key=None)
    assert (group.prompt, group.style) == ("", "text")


def test_a_text_among_messages_is_left_out_and_messages_among_texts() -> None:
    # A raw text beside a conversation would be a response to nothing.
    assert why({"chosen": GOOD, "rejected": "3"}) == "rejected with text in a file of messages"
    texts = {"chosen": "2", "rejected": "3"}
    for mixed in ({"chosen": GOOD, "rejected": "3"}, {**texts, "rejected": json.dumps(BAD)}):
        groups, dropped = read(texts, texts, mixed)
        assert len(groups) == 2
        assert [reason.split(maxsplit=1)[1] for reason in dropped.counts] == ["with messages in a file of texts"]


def test_a_row_without_its_prompt_is_left_out_unless_the_responses_hold_it() -> None:
    texts = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    whole = {"prompt": None, "chosen": GOOD, "rejected": BAD}
    for nothing in (None, "", "  ", []):
        groups, dropped = read(texts, {**texts, "prompt": nothing}, whole)
        assert [group.where for group in groups] == ["a.parquet:0", "a.parquet:2"]
        assert conversations({**whole, "prompt": nothing}, format="prompt") == [GOOD, BAD]
        assert dropped.counts == {"text responses without prompt": 1}


def test_format_text_joins_a_prompt_directly_even_where_a_template_could_make_a_chat() -> None:
    group = read_one({"prompt": "Q: ", "chosen": "a", "rejected": "b"}, format="text")
    assert (group.style, group.prompt, group.responses) == ("text", "Q: ", ["a", "b"])
    reason = "prompt with messages in a file of texts"
    assert why({"prompt": [user("hi")], "chosen": "a", "rejected": "b"}, format="text") == reason


def test_parts_of_text_are_joined_as_the_chat_api_means_them() -> None:
    parts = [{"type": "text", "text": "1 + ", "image_url": None}, {"type": "text", "text": "1?", "image_url": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "2", "rejected": "3"}
    assert conversations(row)[0] == [user("1 + 1?"), assistant("2")]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": "x"}, "text", None, {"text": 1}])
def test_a_part_that_is_no_text_leaves_the_row_out(part: Any) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "look"}, part]}
    row = {"prompt": [turn], "chosen": "2", "rejected": "3"}
    assert why(row) == "prompt with a message that has no text content"


def test_one_message_is_read_as_a_list_of_one() -> None:
    row = {"prompt": user("hi"), "chosen": assistant("a"), "rejected": assistant("b")}
    assert conversations(row) == [[user("hi"), assistant("a")], [user("hi"), assistant("b")]]


def test_system_turns_tool_calls_and_tool_results_stay() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
    before = [system("short"), user("1 + 1?"), {"role": "assistant", "tool_calls": [call]}]
    before.append({"role": "tool", "tool_call_id": "1", "content": "2"})
    row = {"chosen": [*before, assistant("2")], "rejected": [*before, assistant("3")]}
    assert conversations(row) == [row["chosen"], row["rejected"]]


NULLS = {"function": {"name": "f", "arguments": {"x": 1, "y": None, "z": [{"a": None}]}}}
OWN = {"function": {"name": "f", "arguments": {"x": 1, "z": [{}]}}}


@pytest.mark.parametrize(("from_arrow", "wanted"), [(False, NULLS), (True, OWN)])
def test_nulls_in_calls_and_tools_are_kept_unless_arrow_added_them(from_arrow: bool, wanted: Any) -> None:
    chosen = [user("hi"), {"role": "assistant", "content": "", "tool_calls": [NULLS]}]
    row = {"chosen": chosen, "rejected": json.dumps(chosen[:1] + [{**chosen[1], "content": "y"}]), "tools": [NULLS]}
    [group], _ = read_all([Row(row, "a", 0, has_added_nulls=from_arrow)], FormatConfig())
    assert group.metadata == {"tools": [wanted]}
    assert [turns[-1]["tool_calls"] for turns in group.responses] == [[wanted], [NULLS]]  # text of JSON is the file's


def test_rows_of_parquet_have_no_added_nulls_and_rows_of_json_lines_their_own(tmp_path: Path) -> None:
    def call(**arguments: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    row = {"prompt": [user("hi")], "chosen": call(city="Rome", date=None), "rejected": call(city="Oslo", date="today")}
    for name, wanted in (("a.jsonl", {"city": "Rome", "date": None}), ("a.parquet", {"city": "Rome"})):
        write(tmp_path / name, [row], like=name)
        rows = read_rows(resolve_files(SourceConfig(str(tmp_path / name)), key="k"), key="k")
        [group], _ = read_all(rows, FormatConfig())
        assert group.responses[0][0]["tool_calls"][0]["function"]["arguments"] == wanted  # type: ignore[index,call-overload]


def test_a_tool_call_that_no_json_can_hold_leaves_the_row_out() -> None:
    call = {"function": {"name": "f", "arguments": {"x": math.inf}}}
    row = {"chosen": [{"role": "assistant", "tool_calls": [call]}], "rejected": BAD}
    assert why(row) == "tool call in chosen with a value that is not JSON"


def test_turns_that_differ_in_their_tool_calls_are_no_repeats() -> None:
    calls = [[{"function": {"name": name, "arguments": "{}"}}] for name in "fg"]
    first, second = ({"role": "assistant", "tool_calls": each} for each in calls)
    row = {"prompt": [user("hi"), first], "chosen": [second, assistant("a")], "rejected": [second, assistant("b")]}
    assert conversations(row)[0] == [user("hi"), first, second, assistant("a")]


@pytest.mark.parametrize("write", [lambda tools: tools, json.dumps])
def test_tools_travel_in_the_metadata(write: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert read_one({**row, "tools": write(tools)}).metadata == {"tools": tools}
    assert read_one({**row, "tools": write(tools)}, tools_key=None).metadata == {}
    for nothing in (None, "", "null", "[]", []):
        assert read_one({**row, "tools": nothing}).metadata == {}


def test_margin_weight_share_and_source_are_read_where_their_columns_are() -> None:
    row = {"chosen": "a", "rejected": "b"}
    plain = read_one(row)
    assert (only(plain).weight, only(plain).margin, only(plain).p_better, plain.source) == (1.0, None, None, "")
    full = read_one({**row, "margin": 1.5, "weight": 0.25, "p_chosen": 0.75, "source": "hh"})
    assert (only(full).weight, only(full).margin, only(full).p_better, full.source) == (0.25, 1.5, 0.75, "hh")
    empty = read_one({**row, "margin": None, "weight": None, "p_chosen": "", "source": None})
    assert (only(empty), empty.source) == (only(plain), "")


def test_numbers_written_as_text_are_numbers_as_csv_gives_them() -> None:
    row = {"chosen": "a", "rejected": "b", "margin": "-1.5", "weight": " 2e-1 ", "p_chosen": "1"}
    pair = only(read_one(row))
    assert (pair.margin, pair.weight, pair.p_better) == (-1.5, 0.2, 1.0)


def test_labels_against_the_order_keep_the_order_as_it_is_given() -> None:
    pair = only(read_one({"chosen": "a", "rejected": "b", "margin": -1, "p_chosen": 0.1}))
    assert (pair.better, pair.worse, pair.margin, pair.p_better) == (0, 1, -1.0, 0.1)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("margin", math.nan, "margin that is not finite"),
        ("margin", "inf", "margin that is not finite"),
        ("margin", 10**400, "margin that is not finite"),
        ("margin", Decimal("sNaN"), "margin that is not finite"),
        ("margin", 1e300, "margin that is too large for 32 bits"),
        ("margin", True, "margin that is true or false, not a number"),
        ("margin", "0,5", "margin that is not a number"),
        ("margin", "1_000", "margin that is not a number"),
        ("margin", [1], "margin that is not a number"),
        ("weight", -0.5, "negative weight"),
        ("weight", math.inf, "weight that is not finite"),
        ("p_chosen", 1.01, "p_chosen outside 0 to 1"),
        ("p_chosen", 73, "p_chosen outside 0 to 1"),
        ("p_chosen", -0.1, "p_chosen outside 0 to 1"),
        ("p_chosen", math.nan, "p_chosen that is not finite"),
        ("source", {"a": 1}, "source that is not text"),
        ("tools", ["f"], "tools with a tool that is not a JSON object"),
        ("tools", [{"f": b"x"}], "tools with a value that is not JSON"),
        ("tools", [{"f": math.nan}], "tools with a value that is not JSON"),
        ("tools", "[{", "tools that is not valid JSON"),
        ("tools", '{"f": 1}', "tools that is not a list"),
    ],
)
def test_a_label_that_cannot_be_used_leaves_the_row_out(column: str, value: Any, reason: str) -> None:
    row = {"chosen": "a", "rejected": "b"}
    usual = {"margin": 1, "weight": 1, "p_chosen": 1, "source": "s", "tools": []}
    groups, dropped = read({**row, column: usual[column]}, {**row, column: value})
    assert len(groups) == 1
    assert dropped.counts == {reason: 1}


def test_all_names_of_columns_can_be_changed_and_null_reads_no_such_column() -> None:
    row = {"q": "hi", "win": "a", "lose": "b", "m": 1, "w": 2, "p": 0.5, "s": "x", "margin": "large"}
    names = {"prompt_key": "q", "chosen_key": "win", "rejected_key": "lose", "margin_key": "m", "weight_key": "w"}
    group = read_one(row, **names, p_chosen_key="p", source_key="s")
    assert conversations(row, **names)[0] == [user("hi"), assistant("a")]
    assert (only(group).margin, only(group).weight, only(group).p_better, group.source) == (1.0, 2.0, 0.5, "x")
    assert only(read_one(row, **{**names, "margin_key": None})).margin is None


def test_half_a_character_leaves_the_row_out() -> None:
    reason = "text with a lone surrogate"
    assert why({"prompt": "p", "chosen": "a \ud800", "rejected": "b"}) == reason
    assert why({"prompt": [user("\ude00")], "chosen": "a", "rejected": "b"}) == reason
    whole = {"prompt": "p", "chosen": "\U0001f600 \u05e9\u05dc\u05d5\u05dd", "rejected": "b"}
    assert conversations(whole)[0][-1] == assistant("\U0001f600 \u05e9\u05dc\u05d5\u05dd")


def test_a_row_that_could_not_be_read_at_all_counts_with_the_fault_of_its_source() -> None:
    rows = [Row({"chosen": "a", "rejected": "b"}, "a.jsonl", 0), Row({}, "a.jsonl", 1, fault="not JSON")]
    groups, dropped = read_all(rows, FormatConfig())
    assert [group.where for group in groups] == ["a.jsonl:0"]
    assert dropped.describe() == "1 not JSON (first: a.jsonl:1)"
