"""Columns that look like input and are not read: what is named, and what is not."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rm_gallery.data.formats import FormatConfig, ResponsesConfig, choose_format
from tests.data.formats.rows import assistant, numbered, user

LONG = "Tell me a little about the weather"
PAIR = {"chosen": "It rains.", "rejected": "No."}


def warnings(row: dict[str, Any], caplog: pytest.LogCaptureFixture, config: FormatConfig | None = None) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        choose_format(numbered(row, row | {"number": 2}), config or FormatConfig(), logged=set())
    return caplog.messages


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize(
    ("row", "column", "key"),
    [
        ({"prompt": "hi", "context": LONG}, "context", "data.prompt_key"),
        ({"question": "hi", "document": LONG}, "document", "data.prompt_key"),
        ({"prompt": "hi", "system_prompt": LONG}, "system_prompt", "data.system_key"),
        ({"prompt": "hi", "chat_history": [user("q"), assistant("a")]}, "chat_history", "data.history_key"),
        ({"prompt": "hi", "messages": [user(LONG)]}, "messages", "data.prompt_key"),
        ({"prompt": "hi", "contexts": [LONG, "Another text of words"]}, "contexts", "data.prompt_key"),
        ({"prompt": "hi", "turns_before": [{"from": "human", "value": "q"}]}, "turns_before", "data.prompt_key"),
        ({"ask": LONG}, "ask", "data.prompt_key"),  # no row has a prompt
        ({"Frage": LONG}, "Frage", "data.prompt_key"),
        ({"userQuery": LONG}, "userQuery", "data.prompt_key"),
    ],
)
def test_input_that_is_not_read_is_named_with_its_key(
    row: dict[str, Any], column: str, key: str, scoring: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = ResponsesConfig() if scoring else FormatConfig()
    [warning] = warnings(row | PAIR, caplog, config) if column not in ("ask", "Frage") else _of_two(row, caplog, config)
    assert warning.startswith(f"a.parquet: column {column!r} holds ")
    assert f"looks like input and is not read; set {key}={column} to read it" in warning
    assert "docs/custom-datasets.md" in warning


def _of_two(row: dict[str, Any], caplog: pytest.LogCaptureFixture, config: FormatConfig) -> list[str]:
    """Of rows that differ: a text that all rows share is no input, unless its name says so."""
    caplog.clear()
    [(name, value)] = row.items()
    with caplog.at_level(logging.WARNING):
        choose_format(numbered({name: value, **PAIR}, {name: f"{value} again", **PAIR}), config, logged=set())
    return caplog.messages


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "a b c d", "prompt_id": "one two three", "url": "http://a b c", "source": "a set of pairs"},
        {"model": "a model of ours", "chosen_model": "a model of ours", "language": "English of Britain", "score": 1},
        {"feedback": LONG, "rationale": LONG, "critique": LONG, "labelling_prompt": [user(LONG)]},
        {"messages": [user("hi"), assistant("It rains.")], "original_chosen": "It rains.", "prompt_type": "a b c d"},
        {"chosen_conversation": [user("hi"), assistant("It rains.")], "domain": "a b c d", "reference_answer": LONG},
        {"annotators": [{"score": 1}], "annotations": [user(LONG)], "question_count": 3, "context": "", "history": []},
        {
            "context": "English",
            "input": "code",
            "instruction": None,
            "system": "",
            "embedding": [0.5],
            "tags": ["a b c"],
        },
    ],
)
@pytest.mark.parametrize("prompt", ["hi", [user("hi")]])
def test_metadata_and_remarks_are_not_input(prompt: Any, columns: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings({"prompt": prompt, **columns, **PAIR}, caplog) == []


def test_columns_of_the_data_sets_that_are_read_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    whole = {name: [user("hi"), assistant(text)] for name, text in PAIR.items()}
    binarized = {"prompt": "hi", "prompt_id": "7", "messages": whole["chosen"], "score_chosen": 8.0, **whole}
    skywork = {**whole, "source": "a b c"}
    pku = {
        "prompt": "hi", "response_0": "a", "response_1": "b", "prompt_source": "a b c", "is_response_0_safe": True,
        "response_0_source": "Alpaca of three", "better_response_id": 0, "safer_response_id": 0,
    }  # fmt: skip
    shp = {"post_id": "x", "domain": "a b c", "history": LONG, "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    raw = {"chosen": f"Human: {LONG} Assistant: x", "rejected": f"Human: {LONG} Assistant: y", "question": LONG}
    for row in (binarized, skywork, pku, shp, raw):
        assert warnings(row, caplog) == []


def test_a_column_that_is_turned_off_or_read_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "hi", "context": LONG, **PAIR}
    assert warnings(row, caplog, FormatConfig(prompt_key=None)) == []
    assert warnings({"context": LONG, **PAIR}, caplog, FormatConfig(prompt_key="context")) == []
    [warning] = warnings(row, caplog, FormatConfig(prompt_key="context"))  # now the question is not read
    assert "column 'question' holds text" in warning
    assert "set data.prompt_key=question to read it instead of context" in warning


def test_a_system_turn_beside_raw_texts_is_named(caplog: pytest.LogCaptureFixture) -> None:
    row = {"system": "Be brief and kind", "chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}
    [warning] = warnings(row, caplog)
    assert warning.startswith("a.parquet: column 'system' is not read before raw texts; set data.prompt_key, or see")


def test_a_warning_is_logged_once_for_all_files(caplog: pytest.LogCaptureFixture) -> None:
    logged: set[str] = set()
    for file in ("a", "b"):
        choose_format(numbered({"prompt": "hi", "context": LONG, **PAIR}, file=file), FormatConfig(), logged=logged)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert [each for each in logged if each.startswith("warning: a: column 'context'")]
