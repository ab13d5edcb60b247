"""Custom classes: what their hooks give becomes groups and text, and what they do wrong names hook, file and row."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from rm_gallery.data.custom import DataSection
from rm_gallery.data.formats import CustomClassConfig, FormatConfig
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.data.custom.classes import PAIR, ROW, USER, Plain, raising, read, reader_of, said, with_hook
from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset


def test_the_prompt_of_the_hook_goes_before_both_columns() -> None:
    group = read(Plain)
    assert (group.prompt, group.responses, group.comparisons) == ([USER], [said("So."), said("No.")], PAIR)
    assert (group.style, group.where, group.source, group.metadata) == ("chat", "a.parquet:3", "", {})


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (said("So.")[0], "No."),
        (said("So."), said("No.")),
        (tuple(said("So.")), "No."),
        (json.dumps(said("So.")), json.dumps(said("No."))),
        ([USER, *said("So.")], [USER, *said("No.")]),  # they repeat the prompt
    ],
)
def test_responses_may_be_messages(chosen: Any, rejected: Any) -> None:
    group = read(Plain, {**ROW, "chosen": chosen, "rejected": rejected})
    assert [[*group.prompt, *response] for response in group.responses] == [[USER, *said("So.")], [USER, *said("No.")]]


def test_columns_may_have_other_names() -> None:
    row = {"query": "Why?", "good": "So.", "bad": "No."}
    assert read(Plain, row, chosen_key="good", rejected_key="bad").responses == [said("So."), said("No.")]


def test_source_and_ground_truth_come_with_the_group() -> None:
    labelled = with_hook("_extract_ground_truth", lambda row: {"label": [row["query"], 1]})
    both = with_hook("_get_data_source", lambda row: row["query"] + "/part", labelled)
    group = read(both)
    assert group.source == "Why?/part"
    assert group.metadata == {"ground_truth": {"label": ["Why?", 1]}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": None}, "null chosen"),
        ({"chosen": ""}, "empty chosen"),
        ({"rejected": []}, "empty rejected"),
        ({"rejected": said(" ")}, "empty rejected"),
        ({"chosen": [USER]}, "chosen that does not end with an assistant turn"),
        ({"chosen": 5}, "chosen that is int, not text or messages"),
        ({"chosen": ["a", "b"]}, "chosen with a message that has no role"),
        ({"chosen": "No."}, "chosen equal to rejected"),
        ({"query": None}, "prompt with a message that has no text content"),
        ({"query": "\ud800"}, "text with a lone surrogate"),
        ({"chosen": [{"role": "asistant", "content": "So."}]}, "chosen with an unknown role"),
        ({"weight": -1}, "negative weight"),
        ({"p_chosen": 1.5}, "p_chosen outside 0 to 1"),
        ({"margin": "much"}, "margin that is not a number"),
        ({"source": ["a"]}, "source that is not text"),
    ],
)
def test_a_row_that_holds_too_little_is_a_bad_row(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        read(Plain, {**ROW, **changes})
    assert str(error.value) == reason


def test_a_row_without_a_column_is_a_bad_row_that_names_the_key() -> None:
    with pytest.raises(BadRow, match=r"^no column 'better' \(data\.chosen_key\)$"):
        read(Plain, chosen_key="better")


def test_a_row_that_cannot_be_read_is_a_bad_row_before_any_hook() -> None:
    reader = reader_of(with_hook("_build_messages", raising))
    with pytest.raises(BadRow, match=r"^not valid JSON$"):
        reader.read(Row({}, "a.jsonl", 3, fault="not valid JSON"))


def test_columns_that_every_format_reads_count_here_too() -> None:
    group = read(Plain, {**ROW, "weight": 2, "margin": 0.5, "p_chosen": 0.75, "source": "made"})
    assert group.comparisons == (Comparison(0, 1, 2.0, 0.5, 0.75),)
    assert group.source == "made"


def test_values_nested_very_deeply_are_bad_rows_and_no_mistake_of_a_hook() -> None:
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"a": deep}
    calling = {"role": "assistant", "tool_calls": [deep]}
    labelled = with_hook("_extract_ground_truth", lambda row: row["label"])
    for dataset_class, row in (
        (Plain, {**ROW, "chosen": [calling]}),
        (BaseTrainDataset, {**ROW, "chosen": [calling]}),
        (labelled, {**ROW, "label": deep}),
        (
            with_hook("build_group", lambda row: PreferenceGroup([USER], [row["chosen"], "b"], PAIR)),
            {**ROW, "chosen": [calling]},
        ),
    ):
        with pytest.raises(BadRow, match=r"^values nested too deeply$"):
            read(dataset_class, row)


def test_a_ground_truth_of_nan_is_none() -> None:
    assert read(with_hook("_extract_ground_truth", lambda _: float("nan"))).metadata == {}


HOOKS = ("_build_messages", "_extract_ground_truth", "_get_data_source", "build_group")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_names_itself_file_and_row(hook: str) -> None:
    with pytest.raises(UserError) as error:
        read(with_hook(hook, raising))
    assert str(error.value).startswith(f"a.parquet:3: Made.{hook} raised RuntimeError: first line second line ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError), "--debug shows where"


def test_a_hook_that_would_end_the_program_does_not() -> None:
    with pytest.raises(UserError, match=r"^a\.parquet:3: Made\._build_messages raised SystemExit: 3 \(test_hooks\.py:"):
        read(with_hook("_build_messages", lambda _: sys.exit(3)))


def test_a_hook_that_misses_a_column_names_those_there_are() -> None:
    with pytest.raises(UserError) as error:
        read(with_hook("_build_messages", lambda row: row["question"]))
    assert "KeyError: 'question'" in str(error.value)
    assert str(error.value).endswith("; fix the hook (columns of the row: query, chosen, rejected)")


@pytest.mark.parametrize(
    ("hook", "value", "sentence"),
    [
        ("_build_messages", "Why?", "returned str instead of a list of messages (mappings with role and content)"),
        ("_build_messages", None, "returned NoneType instead of a list of messages"),
        ("_build_messages", ["Why?"], "returned a list with str in it instead of a list of messages"),
        ("_get_data_source", 5, "returned int instead of text for the source"),
        ("_extract_ground_truth", datetime.date(2000, 1, 1), "returned date instead of a plain JSON value as gr"),
        ("_extract_ground_truth", {"a": {1}}, "returned dict instead of a plain JSON value as ground_truth"),
        ("build_group", "text", "returned str instead of a PreferenceGroup, None or (None, reason)"),
        ("build_group", (None, 5), "returned tuple instead of a PreferenceGroup"),
        ("build_group", PreferenceGroup("a", "bc", PAIR), "returned str instead of a list of responses"),
        ("build_group", PreferenceGroup(5, ["b", "c"], PAIR), "returned int instead of a list of messages"),
        ("build_group", PreferenceGroup("a", ["b", "c"], ((0, 1),)), "returned tuple instead of a Comparison"),
        ("build_group", PreferenceGroup("a", ["b", "c"], None), "returned NoneType instead of a list of comparisons"),
        ("build_group", PreferenceGroup("a", ["b", "c"], PAIR, source=5), "returned int instead of text for the"),
        ("build_group", PreferenceGroup("a", ["b", "c"], PAIR, metadata=5), "returned int instead of a mapping as "),
        ("build_group", PreferenceGroup("a", ["b", "c"], PAIR, metadata={"a": {1}}),
         "returned set instead of a plain JSON value as a"),
        ("build_group", PreferenceGroup("a", ["b", "c"], (Comparison(0, 1.0),)), "compares response 0 with 1.0 of 2"),
        ("build_group", PreferenceGroup("a", ["b", "c"], (Comparison(0, 2),)),
         "compares response 0 with 2 of 2 (the first is 0)"),
        ("build_group", PreferenceGroup("a", ["b", "c"], (Comparison(1, 1),)), "compares response 1 with 1 of 2"),
    ],
)  # fmt: skip
def test_a_hook_that_gives_something_else_names_itself_file_and_row(hook: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        read(with_hook(hook, lambda _: value))
    assert str(error.value).startswith(f"a.parquet:3: Made.{hook} {sentence}")
    assert str(error.value).endswith("; fix the hook")


def test_a_constructor_that_refuses_its_arguments_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^data\.custom_cls\.name=object: object\(data_files, tokenizer, config\) raise"
    ):
        reader_of(object)


def test_build_group_gives_rankings_bare_text_and_reasons() -> None:
    ranked = PreferenceGroup(
        [USER], ["a", "b", said("c")], (Comparison(0, 1), Comparison(1, 2, weight=2)), source="own"
    )
    group = read(with_hook("build_group", lambda _: ranked))
    assert group == replace(ranked, responses=[said("a"), said("b"), said("c")], style="chat", where="a.parquet:3")
    bare = read(with_hook("build_group", lambda _: PreferenceGroup("Q: ", ["a", "b"], PAIR)))
    assert (bare.prompt, bare.responses, bare.style) == ("Q: ", ["a", "b"], "text")
    as_chat = read(with_hook("build_group", lambda _: PreferenceGroup("Why?", ["a", "b"], PAIR, "chat")))
    assert (as_chat.prompt, as_chat.responses) == ([USER], [said("a"), said("b")])


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (None, "dropped by build_group"),
        ((None, "no votes"), "no votes"),
        ((None, "no\n votes"), "no votes"),
        ((None, ""), "dropped by build_group"),
        (PreferenceGroup("a", ["b", "\ud800"], PAIR), "text with a lone surrogate"),
        (PreferenceGroup("a", ["b", "c"]), "no comparison between its responses"),
        (PreferenceGroup("a", ["b", " "], PAIR), "empty response"),
        (PreferenceGroup([USER], ["b", " "], PAIR), "empty response"),
        (PreferenceGroup([USER], ["b", None], PAIR), "null response"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, weight=float("nan")),)),
         "a weight that is not a finite number of at least 0"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, weight=-1),)),
         "a weight that is not a finite number of at least 0"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, margin=float("inf")),)),
         "a margin that is not a finite number"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, p_better=2),)), "a share of annotators outside 0 to 1"),
    ],
)  # fmt: skip
def test_a_row_that_build_group_cannot_use_is_counted_by_reason(made: Any, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        read(with_hook("build_group", lambda _: made))
    assert str(error.value) == reason


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    import numpy as np

    made = PreferenceGroup("a", ["b", "c"], [Comparison(np.int64(1), np.int8(0), np.float32(0.5), np.float64(2))])
    [comparison] = read(with_hook("build_group", lambda _: made)).comparisons
    assert comparison == Comparison(1, 0, 0.5, 2.0)
    assert {type(value) for value in (comparison.better, comparison.worse)} == {int}
    assert {type(value) for value in (comparison.weight, comparison.margin)} == {float}


def test_hooks_fill_in_what_build_group_leaves_open() -> None:
    made = {"group": PreferenceGroup([USER], ["a", "b"], PAIR)}
    sourced = with_hook("_get_data_source", lambda _: "hook", with_hook("build_group", lambda _: made["group"]))
    both = with_hook("_extract_ground_truth", lambda _: "hook", sourced)
    assert (read(both).source, read(both).metadata) == ("hook", {"ground_truth": "hook"})
    made["group"] = replace(made["group"], source="own", metadata={"ground_truth": 1, "id": 7})
    assert (read(both).source, read(both).metadata) == ("own", {"ground_truth": 1, "id": 7})


def test_the_data_section_reads_as_attributes_items_and_with_get() -> None:
    section = DataSection(FormatConfig(chosen_key="good", custom_cls=CustomClassConfig("a.py", "A")))
    assert (section.chosen_key, section["chosen_key"], section.get("chosen_key")) == ("good",) * 3
    assert (section.custom_cls.name, section["custom_cls"]["path"]) == ("A", "a.py")
    assert (section.get("nothing", 5), "nothing" in section, len(section) == len(dict(section))) == (5, False, True)
    with pytest.raises(AttributeError, match=r"^the data section has no key 'nothing'$"):
        _ = section.nothing
    assert DataSection({"max_length": 7}).max_length == 7
    assert DataSection().rejected_key == "rejected"
