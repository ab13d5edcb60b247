"""Structured answers: text of all sorts becomes a checked value, or one sentence on why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel

from rm_gallery.core.models.structured import ParseError, parse_answer, request_format, with_instruction

SCHEMA = {
    "type": "object",
    "properties": {
        "score": {"type": "number", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string"}},
        "level": {"enum": ["low", "high"]},
    },
    "required": ["score"],
}


class Judgement(BaseModel):
    score: int
    reason: str = ""


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 4}',
        '  {"score": "4"}\n',
        'Sure!\n```json\n{"score": 4}\n```\nAnything else?',
        '```\n{"score": 4}\n```',
        "<think>{1, 2} or {3}? {\"score\": 1}</think>{\"score\": 4}",
        "The score is: {'score': 4,}",
        '{"score": 4',
        '{"score": 4, "reason": "said "well" twice"}',
    ],
)  # fmt: skip
def test_json_is_found_and_mended(text: str) -> None:
    assert parse_answer(text, SCHEMA)["score"] == 4
    assert parse_answer(text, Judgement).score == 4


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("quite good", "no JSON in the response"),
        ("", "no JSON in the response"),
        ("[4]", "list, expected object"),
        ('{"mark": 4}', "'score' is missing"),
        ('{"score": "good"}', "score: str, expected number"),
        ('{"score": true}', "score: bool, expected number"),
        ('{"score": null}', "score: NoneType, expected number"),
        ('{"score": 6}', "score: 6 is outside 1..5"),
        ('{"score": 4, "tags": ["a", 2]}', r"tags\[1\]: int, expected string"),
        ('{"score": 4, "level": "mid"}', "level: 'mid' is not one of"),
    ],
)
def test_what_does_not_fit_is_said(text: str, what: str) -> None:
    with pytest.raises(ParseError, match=what):
        parse_answer(text, SCHEMA)


def test_a_pydantic_class_gives_its_instance_or_the_field_that_is_wrong() -> None:
    assert parse_answer('{"score": 3, "reason": "r"}', Judgement) == Judgement(score=3, reason="r")
    with pytest.raises(ParseError, match="score: Input should be a valid integer"):
        parse_answer('{"score": "much"}', Judgement)


def test_the_apis_own_formats_are_sent_as_they_are() -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    assert request_format(wrapped) == wrapped
    assert request_format({"type": "json_object"}) == {"type": "json_object"}
    assert request_format(SCHEMA)["json_schema"]["schema"] == SCHEMA
    assert request_format(Judgement)["json_schema"]["name"] == "Judgement"
    assert parse_answer('{"anything": 1}', {"type": "json_object"}) == {"anything": 1}


def test_the_schema_goes_into_the_last_turn() -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = with_instruction(messages, SCHEMA)
    assert messages[1]["content"] == "u", "the caller's messages stay as they are"
    assert asked[0] == messages[0] and json.dumps(SCHEMA) in asked[1]["content"]
    parts = with_instruction([{"role": "user", "content": [{"type": "text", "text": "u"}]}], SCHEMA)
    assert [part["type"] for part in parts[0]["content"]] == ["text", "text"]
