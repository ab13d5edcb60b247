"""Chats: the arguments of tool calls reach the chat template in the form that servers pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow
from rm_gallery.schema import PreferenceGroup
from tests.small import CHATML, make_tokenizer


def rendered(written: str, arguments: Any, **call: Any) -> str:
    """What a template that writes `written` for a call makes of these arguments."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{{ m['content'] }}", "{{ m.content }}{% for c in m.tool_calls or [] %}" + written + "{% endfor %}"
    )
    calls = call or {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}
    group = PreferenceGroup([], [[{"role": "assistant", "content": "", **calls}]], (), "chat", "a:0")
    [ids] = Encoder(tokenizer, TokenizeConfig()).encode(group)
    text = str(tokenizer.decode(ids))
    return text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")


AS_JSON = "{{ c.function.arguments | tojson }}"


@pytest.mark.parametrize("arguments", [{"city": "Rome", "n": [1, None]}, '{"city":"Rome","n":[1,null]}'])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (AS_JSON, '{"city": "Rome", "n": [1, null]}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Rome;n=[1, None];"),
        ("{{ c.function.arguments }}", "{'city': 'Rome', 'n': [1, None]}"),  # what servers write, too
    ],
)
def test_a_json_string_and_its_object_are_the_same_call(arguments: Any, written: str, expected: str) -> None:
    assert rendered(written, arguments) == expected


def test_a_template_that_joins_strings_takes_the_text() -> None:
    joins = "{{ '<' + c.function.arguments + '>' }}"
    assert rendered(joins, '{"city":"Rome"}') == '<{"city":"Rome"}>'
    assert rendered(joins, {"city": "Rome"}) == '<{"city": "Rome"}>'


@pytest.mark.parametrize(("arguments", "expected"), [("", "{}"), (None, "{}"), ("not json", '"not json"'), ("5", "5")])
def test_other_strings_as_servers_pass_them_or_unchanged(arguments: Any, expected: str) -> None:
    assert rendered(AS_JSON, arguments) == expected


def test_calls_without_a_function_object() -> None:
    call = {"name": "f", "arguments": '{"a":1}'}
    assert rendered("{{ c.arguments | tojson }}", None, tool_calls=[call]) == '{"a": 1}'


def test_a_token_that_json_escapes_stays_text() -> None:
    escaped = json.dumps({"a": "<|im_end|>"}).replace("<", "\\u003c")
    assert rendered(AS_JSON, escaped) == '{"a": "<|im_end|>"}'
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{{ m.tool_calls[0].function.arguments | tojson }}")
    calls = [{"function": {"name": "f", "arguments": escaped}}]
    group = PreferenceGroup([], [[{"role": "assistant", "tool_calls": calls}]], (), "chat", "a:0")
    assert Encoder(tokenizer, TokenizeConfig()).encode(group)[0].count(tokenizer.eos_token_id) == 1


def test_of_two_failing_forms_the_error_is_that_of_the_objects() -> None:
    with pytest.raises(BadRow, match="chat template rejects the conversation: no calls"):
        rendered("{{ raise_exception('no calls') }}", {"a": 1})
