"""Choosing a format: what decides, what is said about it, and what is said when nothing fits."""

from __future__ import annotations

import json
import logging
import typing
from typing import Any

import pytest

from rm_gallery.data.formats import READERS, SAMPLE_ROWS, FormatConfig, RowReader, choose_format
from rm_gallery.data.formats.registry import CONVERSATION_READERS
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError
from tests.data.formats.rows import assistant, configured, numbered, read, read_all, user

CHATS = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
TEXTS = {"chosen": "a", "rejected": "b"}
RANKED: dict[str, Any] = {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 2]}
OUTPUT = [{"content": "a", "label": 1}, {"content": "b", "label": 0}]
PUBLISHED: dict[str, Any] = {"context": [user("hi")], "response1": "a", "response2": "b", "overall_preference": 1}

EXAMPLES: dict[str, tuple[Any, str]] = {
    "text": (TEXTS, "chosen, rejected hold text, and there is no prompt"),
    "messages": (CHATS, "chosen, rejected hold lists of messages, and there is no prompt"),
    "json": (
        {key: json.dumps(value) for key, value in CHATS.items()},
        "chosen, rejected hold JSON strings of lists of messages, and there is no prompt",
    ),
    "prompt": ({"prompt": "hi", **TEXTS}, "prompt holds text, and chosen, rejected hold text"),
    "scored": (RANKED, "it has responses, scores; read too: prompt"),
    "ranked": ({"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 2]}, "it has responses, ranks; read too: prompt"),
    "helpsteer3": (PUBLISHED, "it has context, response1, response2, overall_preference"),
    "nested": ({"input": "hi", "output": OUTPUT}, "it has input, output"),
    "completions": ({"instruction": "hi", "completions": OUTPUT}, "it has completions; read too: instruction"),
    "lists": (
        {"prompt": "hi", "chosen": ["a"], "rejected": ["b", "c"]},
        "chosen, rejected hold lists of responses; read too: prompt",
    ),
    "swift": ({"messages": CHATS["chosen"], "rejected_response": "b"}, "it has messages, rejected_response"),
    "saferlhf": (
        {"prompt": "hi", "response_0": "a", "response_1": "b", "better_response_id": 1},
        "it has response_0, response_1, better_response_id; read too: prompt",
    ),
    "shp": (
        {"history": "hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        "it has human_ref_A, human_ref_B, labels; read too: history",
    ),
    "arena": (
        {"conversation_a": CHATS["chosen"], "conversation_b": CHATS["rejected"], "winner": "model_b"},
        "it has conversation_a, conversation_b, winner",
    ),
    "summaries": (
        {"info": {"post": "hi"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
        "it has summaries, choice; read too: info",
    ),
    "helpsteer2": (
        [{"prompt": "hi", "response": text, "helpfulness": score} for text, score in (("a", 1), ("b", 2))],
        "it has response, helpfulness, prompt",
    ),
}


def choose(*rows: dict[str, Any], **options: Any) -> tuple[str, str]:
    choice = choose_format(numbered(*rows), configured(**options))
    return choice.name, choice.why


def refused(*rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read(*rows, **options)
    return str(error.value)


@pytest.mark.parametrize("name", list(READERS))
def test_auto_finds_each_format_and_says_what_decided(name: str) -> None:
    row, why = EXAMPLES[name]
    rows = row if isinstance(row, list) else [row]
    assert choose(*rows) == (name, why)
    assert len(read(*rows)[0]) == 1


@pytest.mark.parametrize("name", list(READERS))
def test_each_format_can_be_named(name: str) -> None:
    row, _ = EXAMPLES[name]
    rows = row if isinstance(row, list) else [row]
    assert choose(*rows, format=name) == (name, f"data.format={name}")
    assert len(read(*rows, format=name)[0]) == 1


def test_the_configuration_knows_the_names_of_all_formats() -> None:
    known = typing.get_args(typing.get_type_hints(FormatConfig)["format"])
    assert known == ("auto", *READERS, *CONVERSATION_READERS)


def test_a_choice_is_logged_once_for_all_files_that_it_is_the_same_for(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*numbered(TEXTS, file="a.parquet"), *numbered(TEXTS, file="b.parquet"), *numbered(CHATS, file="c.parquet")]
    with caplog.at_level(logging.INFO):
        read_all(rows, FormatConfig())
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages == [
        "a.parquet: detected data.format=text: chosen, rejected hold text, and there is no prompt",
        "c.parquet: detected data.format=messages: chosen, rejected hold lists of messages, and there is no prompt",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read_all(rows[:2], FormatConfig(format="text"))
    assert not caplog.messages  # nothing was chosen


def test_the_format_is_chosen_for_each_file() -> None:
    rows = [*numbered(TEXTS, file="a.parquet"), *numbered(RANKED, RANKED, file="b.parquet")]
    groups, _ = read_all(rows, FormatConfig())
    assert [(group.where, len(group.responses)) for group in groups] == [
        ("a.parquet:0", 2),
        ("b.parquet:0", 2),
        ("b.parquet:1", 2),
    ]


def test_most_of_the_cells_decide_between_texts_and_messages() -> None:
    mixed = choose(CHATS, CHATS, TEXTS)
    assert mixed == ("messages", "chosen, rejected hold lists of messages in 4 of 6 cells, and there is no prompt")
    assert choose({"chosen": CHATS["chosen"], "rejected": "b"})[0] == "messages"
    assert choose({"chosen": None, "rejected": None}, TEXTS)[0] == "text"
    assert choose({"chosen": None, "rejected": None})[0] == "text"


def test_columns_of_any_of_the_first_rows_count() -> None:
    # JSON lines need not have the same keys
    assert choose({"id": 1}, {"prompt": None, **TEXTS}, {"prompt": "hi"})[0] == "prompt"


def test_pairs_come_first_where_several_formats_fit_and_the_others_are_named() -> None:
    both = {**RANKED, **TEXTS, "source": "s"}
    assert choose(both) == (
        "prompt",
        "prompt holds text, and chosen, rejected hold text; read too: source; scored would fit too",
    )
    assert choose(both, format="scored")[0] == "scored"
    assert choose(both, chosen_key=None)[0] == "scored"


def test_rows_that_could_not_be_read_decide_nothing() -> None:
    rows = [Row({}, "a.jsonl", 0, fault="not JSON"), *numbered(TEXTS, file="a.jsonl")]
    assert choose_format(rows, FormatConfig()).name == "text"
    with pytest.raises(UserError) as error:
        choose_format(rows[:1], FormatConfig())
    assert str(error.value) == (
        "a.jsonl:0: not JSON; no row of the first 1 can be read; recreate the file"
    )  # fmt: skip


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    assert refused({"choosen": "a", "rejected": "b"}) == (
        "a.parquet: no column 'chosen' (columns: choosen, rejected); rename it or set data.chosen_key."
        " Did you mean 'choosen'?"
    )
    assert refused({"responses": ["a", "b"], "score": [1, 2]}) == (
        "a.parquet: no column 'scores' (columns: responses, score); rename it or set data.scores_key."
        " Did you mean 'score'?"
    )
    assert refused({"question": "q", "good": "a", "bad": "b"}) == (
        "a.parquet: no column 'chosen' and no column 'rejected' (columns: question, good, bad); rename them or set "
        "data.chosen_key and data.rejected_key."
    )
    assert refused(TEXTS, format="prompt") == (
        "a.parquet: no column 'prompt' (columns: chosen, rejected); rename it or set data.prompt_key."
    )


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("prompt_key", TEXTS), ("chosen_key", TEXTS), ("rejected_key", TEXTS), ("margin_key", TEXTS),
        ("weight_key", TEXTS), ("p_chosen_key", TEXTS), ("source_key", TEXTS), ("tools_key", TEXTS),
        ("responses_key", RANKED), ("scores_key", RANKED), ("ranks_key", RANKED), ("response1", PUBLISHED),
        ("output", {"input": "hi", "output": OUTPUT}), ("completions", {"completions": OUTPUT}),
    ],
)  # fmt: skip
def test_a_column_that_the_configuration_names_must_exist(key: str, row: dict[str, Any]) -> None:
    path = key if key.endswith("_key") else f"columns.{key}"
    sentence = refused({**row, "colum": 1}, **{key: "column"})
    assert sentence.startswith("a.parquet: no column 'column' (columns: ")
    assert sentence.endswith(f"; rename it or set data.{path}. Did you mean 'colum'?")


def test_a_named_format_asks_only_for_its_own_columns() -> None:
    # so that one run can read files of several formats, each with columns named as the file has them
    assert choose(RANKED, chosen_key="better", format="scored")[0] == "scored"


def test_a_column_that_is_needed_cannot_be_null() -> None:
    assert refused(TEXTS, format="text", chosen_key=None) == (
        "data.chosen_key=null: data.format needs this column; set its name, or another format"
    )


def test_columns_of_no_format_are_listed_with_all_formats() -> None:
    sentence = refused({"ask": "a", "reply": "b"})
    assert sentence.startswith("a.parquet: no known format in the columns ask, reply; rename them, or")
    assert all(f"{name}: {READERS[name].looks}" in sentence for name in READERS)
    assert refused({}).startswith("a.parquet: no known format in the columns none; ")
    many = refused({f"column {number}\n": 1 for number in range(1000)})
    assert "\n" not in many
    assert "and 980 more" in many


def test_an_unknown_format_is_named_with_the_nearest() -> None:
    names = ", ".join(READERS)
    sentence = f"data.format=score: must be auto or one of {names}. Did you mean 'scored'?"
    assert refused(TEXTS, format="score") == sentence
    with pytest.raises(UserError, match="Did you mean 'scored'"):
        RowReader(FormatConfig(), "score", has_chat_template=True)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (1, "int"), (1.5, "float"), (True, "bool"), (b"x", "bytes"), ({"name": "x"}, "dict"),
        (["x"], "lists of str"), ([[("role", "user")]], "lists of list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_a_column_of_another_type_is_an_error_and_one_such_cell_a_dropped_row(name: str, value: Any, held: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    unless = "; null reads no such column" if name == "prompt" else ""
    assert refused({**row, name: None}, {**row, name: value}) == (
        f"a.parquet:1: column {name!r} contains {held}, not text or messages; "
        f"convert it, or choose another column with data.{name}_key{unless}"
    )
    groups, dropped = read(row, {**row, name: value}, row)
    assert [group.where for group in groups] == ["a.parquet:0", "a.parquet:2"]
    assert dropped.total == 1


@pytest.mark.parametrize(
    ("column", "value", "held", "meant"),
    [
        ("margin", "large", "text", "numbers"), ("weight", True, "bool", "numbers"), ("p_chosen", [1], "lists of int",
        "numbers"), ("source", ["a"], "lists of str", "names"), ("tools", "search", "text", "lists or their JSON"),
    ],
)  # fmt: skip
def test_a_column_that_is_meant_otherwise_can_be_left_unread(column: str, value: Any, held: str, meant: str) -> None:
    row = {**TEXTS, column: value}
    assert refused(row) == (
        f"a.parquet:0: column {column!r} contains {held}, not {meant}; convert it, or choose another column with "
        f"data.{column}_key; null reads no such column"
    )
    assert len(read(row, **{f"{column}_key": None})[0]) == 1


def test_lists_are_wanted_where_responses_are() -> None:
    assert refused({"input": "hi", "output": "a text"}) == (
        "a.parquet:0: column 'output' contains text, not lists or their JSON; convert it, or choose another column "
        "with data.columns.output"
    )


def test_what_comes_after_the_first_rows_is_counted_not_refused() -> None:
    rows = [TEXTS] * SAMPLE_ROWS + [{"chosen": 1, "rejected": "b"}, {"other": 1}]
    groups, dropped = read(*rows)
    assert len(groups) == SAMPLE_ROWS
    assert dropped.counts == {"chosen that is int, not text or messages": 1, "null chosen": 1}
