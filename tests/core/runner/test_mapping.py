"""Mappers: what a path finds, and what is said when it finds nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rm_gallery.core.runner.grader_config import (
    check_mapper,
    get_value_by_mapping,
    get_value_by_path,
    parse_data_with_mapper,
)
from rm_gallery.errors import UserError

SAMPLE: dict[str, Any] = {
    "query": "Q",
    "turns": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "c"}]},
    ],
    "by number": {"0": "zero"},
    "a.b": {"c.d": 1},
    "nothing": None,
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("query", "Q"),
        ("turns.0.messages.1.content", "b"),
        ("turns.-1.messages.-1.role", "user"),
        ("turns.0.messages.content", ["a", "b"]),
        ("turns.messages.content", [["a", "b"], ["c"]]),
        ("turns.messages.0.content", ["a", "c"]),
        ("by number.0", "zero"),
        ("a.b", {"c.d": 1}),
        ("nothing", None),
    ],
)
def test_a_path_finds_its_value(path: str, value: Any) -> None:
    assert get_value_by_path(SAMPLE, path) == value


def test_a_name_over_an_empty_list_collects_nothing() -> None:
    assert get_value_by_path({"messages": []}, "messages.content") == []


def test_an_array_is_a_list() -> None:
    messages = np.array([{"content": "a"}, {"content": "b"}], dtype=object)
    assert get_value_by_path({"messages": messages}, "messages.content") == ["a", "b"]
    assert get_value_by_path({"messages": messages}, "messages.1.content") == "b"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "qury",
            "path 'qury': there is no 'qury' in the sample; the keys are 'query', 'turns', .*Did you mean 'query'",
        ),
        ("turns.0.mesages", r"no 'mesages' at 'turns.0'; the keys are 'messages'. Did you mean 'messages'\?"),
        ("turns.5.messages", "no item 5 at 'turns': that list has 2 items"),
        ("turns.messages.1.content", "no item 1 at 'turns.1.messages': that list has 1 items"),
        ("query.text", "no 'text' at 'query': that is a string"),
        ("nothing.text", r"no 'text' at 'nothing': that is empty \(None\)"),
    ],
)
def test_an_error_names_the_path_the_missing_part_and_what_is_there(path: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_value_by_path(SAMPLE, path)


def test_an_error_lists_a_dozen_keys_at_most() -> None:
    with pytest.raises(UserError, match="'key 11' and 88 more"):
        get_value_by_path({f"key {index}": 0 for index in range(100)}, "text")


def test_a_mapping_names_the_parameter_that_has_no_value() -> None:
    assert get_value_by_mapping(SAMPLE, {"text": "query"}) == {"text": "Q"}
    with pytest.raises(UserError, match="mapper for 'text': path 'missing'"):
        get_value_by_mapping(SAMPLE, {"text": "missing"})


def test_arguments_are_the_sample_a_mapping_of_it_or_what_a_function_makes() -> None:
    assert parse_data_with_mapper({"text": "a"}) == {"text": "a"}
    assert parse_data_with_mapper({"q": "a"}, {"text": "q"}) == {"text": "a"}
    assert parse_data_with_mapper(("a", "b"), lambda sample: {"text": sample[1]}) == {"text": "b"}


def test_arguments_that_are_no_dictionary_are_refused() -> None:
    with pytest.raises(UserError, match="the sample is a string: it must be a dictionary"):
        parse_data_with_mapper("text")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the result of the mapper function is a list"):
        parse_data_with_mapper({}, lambda sample: [])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("mapper", ["query", ["query"], {"text": 3}, {"text": "a..b"}, {"text": ""}, {3: "a"}, dict])
def test_what_can_be_no_mapper_is_refused(mapper: Any) -> None:
    with pytest.raises(UserError, match=r"^grader 'a': the mapper"):
        check_mapper(mapper, "grader 'a'")
