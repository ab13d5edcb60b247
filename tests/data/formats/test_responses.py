"""Responses without preferences: every layout that training reads, and three more, give groups to score."""

from __future__ import annotations

from typing import Any

import pytest

from rm_gallery.data.formats import READERS, ResponsesConfig, RowReader, choose_format
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import PreferenceGroup
from tests.data.damage import SAMPLES
from tests.data.formats.rows import assistant, numbered, read_one, user


def to_score(row: dict[str, Any], **options: Any) -> PreferenceGroup:
    config, rows = ResponsesConfig(**options), numbered(row)
    return RowReader(config, choose_format(rows, config).name, has_chat_template=True).read(rows[0])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_layout_of_training_gives_the_same_prompt_and_responses_without_labels(name: str) -> None:
    sample = SAMPLES[name]
    trained, scored = read_one(sample.row), to_score(sample.row)
    assert (scored.prompt, scored.responses, scored.style) == (trained.prompt, trained.responses, trained.style)
    assert (scored.comparisons, scored.metadata, scored.source) == ((), trained.metadata, trained.source)
    labels = ("scores", "ranks", "overall_preference", "individual_preference", "weight", "margin", "p_chosen")
    bare = {column: value for column, value in sample.row.items() if column not in labels}
    assert to_score(bare).responses == trained.responses


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "hi", "response": "a"}, [user("hi")], [[assistant("a")]]),
        ({"response": "a"}, "", ["a"]),
        ({"prompt": "hi", "responses": ["a"]}, [user("hi")], [[assistant("a")]]),
        ({"prompt": "hi", "responses": []}, [user("hi")], []),
        ({"messages": [user("hi"), assistant("a")]}, [], [[user("hi"), assistant("a")]]),
        ({"prompt": [user("hi")], "response": [assistant("a")]}, [user("hi")], [[assistant("a")]]),
    ],
)
def test_layouts_without_preferences(row: dict[str, Any], prompt: Any, responses: Any) -> None:
    group = to_score(row)
    assert (group.prompt, group.responses) == (prompt, responses)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "same", "rejected": "same"},
        {"prompt": "hi", "chosen": "", "rejected": "b"},
        {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]},
        {"prompt": "hi", "responses": ["a", "b"], "scores": None},
        {"chosen": [user("a")], "rejected": [user("b")]},
        {"prompt": "hi", "responses": [str(number) for number in range(300)]},
    ],
)
def test_checks_of_training_do_not_apply(row: dict[str, Any]) -> None:
    assert to_score(row).responses


def test_one_style_for_all_rows_of_a_model_trained_on_chats() -> None:
    group = to_score({"chosen": "a", "rejected": ""}, input_style="chat")
    assert (group.style, group.responses) == ("chat", [[assistant("a")], [assistant("")]])


def test_a_null_response_is_a_bad_row_and_a_file_without_responses_an_error() -> None:
    with pytest.raises(BadRow, match=r"^null response$"):
        to_score({"prompt": "hi", "response": None})
    with pytest.raises(UserError, match=r"^a\.parquet: no known format in the columns text; .*response: one response"):
        to_score({"text": "hi"})
    assert not {"conversation", "responses", "response"} & READERS.keys()
