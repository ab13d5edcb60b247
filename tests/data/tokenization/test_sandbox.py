"""Sandbox: templates that loop or grow without bound are stopped; all others write what the library writes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rm_gallery.data.tokenization import template_limits
from rm_gallery.data.tokenization.chats import Chat, ChatRenderer
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.sandbox import limited_template
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import PreferenceGroup
from tests.small import CHATML, make_tokenizer
from tests.templates import INST, QWEN3

MESSAGES = [{"role": "user", "content": "q & <a>"}, {"role": "assistant", "content": "r\n"}]


def render(template: str) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer).render(Chat(MESSAGES[:1], MESSAGES[1:]), "a:0")


NS = "{% set ns = namespace(s='ab', l=[1]) %}{% for i in range(99) %}"
LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ 10 ** (10 ** 10) }}",
    NS + "{% set ns.s = ns.s * 2 %}{% endfor %}",
    NS + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    NS + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    NS + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    NS + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f('ab') }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a' | indent(10**10, first=true) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "{% set a = 'x' * 10**7 %}{{ a.replace('x', a) }}",
    "{% set a = 'x' * 10**7 %}{{ (['a'] * 10**5) | join(a) }}",
    "{{ ''.join(range(99999) | map('center', 10**6)) }}",
    "{{ [1] | batch(10**10, 1) | list }}",
    "{{ dict.fromkeys(range(99999), 'x' * 10**6) }}",
    "{% set a = namespace() %}{% set b = namespace(x=a) %}",
    "{{ messages | tojson(indent=10**10) }}",
]


@pytest.mark.parametrize("template", LARGE)
@pytest.mark.slow
def test_a_template_that_grows_without_bound_rejects_the_row(template: str) -> None:
    with pytest.raises(BadRow, match=r"chat template rejects the conversation: it (builds|computes|stores)"):
        render(template)


def test_a_list_in_lists_counts_as_often_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_VALUES", 2**12)
    with pytest.raises(BadRow, match="a list of more than 4,096 values"):
        render("{% set x = [1] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}")


LOOPS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for i in range(999) %}{% for j in range(999) | map('string') %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_loops_without_bound_stops_the_run(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 20_000)
    found: list[BaseException] = []

    def other_thread() -> None:
        with pytest.raises(UserError, match="a:0: the chat template needs more than 20,000 loop iterations") as error:
            render(template)
        found.append(error.value)

    with pytest.raises(UserError, match="a:0: the chat template needs more than 20,000 loop iterations"):
        render(template)
    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_a_slow_loop_stops_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"runs for more than 0.05 seconds"):
        render("{% set s = 'x' * 10**6 %}{% for i in range(99999) %}{% if 'zz' in s %}{% endif %}{% endfor %}")


def test_a_range_above_the_library_limit_rejects_the_row() -> None:
    with pytest.raises(BadRow, match="Range too big"):
        render("{% for i in range(10**9) %}{% endfor %}")


ORDINARY = [
    CHATML,
    QWEN3,
    INST,
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m | tojson(indent=2) }}{% endfor %}",
    "{% for m in messages[::-1] if m.role == 'user' %}{{ m.content | e | upper }}{% else %}none{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ ['a', messages[0].role] }}{{ (1, 2.5, none, true) }}",
    (
        "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
        "{% set ns.l = ns.l + [m.role ~ ns.n] %}{% endfor %}{{ ns.l }}{{ ns.n * 2 }}"
        "{{ 'ab' * 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}"
    ),
    "{{ '%s-%d' % ('a', 3) }}{{ '{} {x!r}'.format(1, x='y') }}{{ 'a\tb'.expandtabs(4) }}{{ 'a,b'.split(',') | list }}",
    "{% macro deep(x, n=2) %}{{ x }}{% if n %}{{ deep(x ~ n, n - 1) }}{% endif %}{% endmacro %}{{ deep('m') }}",
    (
        "{% for x in [[1, [2]], [3]] recursive %}"
        "{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}"
    ),
    (
        "{{ dict(a=1) | tojson }}{{ {'b': messages[0].role} | items | list }}"
        "{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ undefined_ }}"
    ),
    "{% call(x) wrap() %}{{ x }}{% endcall %}{% macro wrap() %}{{ caller('c') }}{% endmacro %}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_other_templates_write_what_the_library_writes(template: str) -> None:
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = template

    def outcome(apply: Any) -> str:
        try:
            return str(apply(MESSAGES, tokenize=False))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert outcome(limited_template(tokenizer)) == outcome(tokenizer.apply_chat_template)


def test_a_template_gets_the_variables_of_the_library() -> None:
    tokenizer: Any = make_tokenizer()
    dump = (
        "{{ messages | tojson }}{{ tools | tojson }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}"
        "{{ extra }}{{ bos_token is defined }}{{ strftime_now('%Y') }}{# #}{#- x -#}\n\n"
    )
    tokenizer.chat_template = {"default": dump, "tool_use": "tools: " + dump}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "n": 1.0}], "name": None},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "r",
            "tool_calls": [{"function": {"arguments": {"k": None}}}],
        },
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    for given in ({}, {"tools": [tool]}, {"add_generation_prompt": True, "extra": "e"}, {"chat_template": "x" + dump}):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        assert limited_template(tokenizer)(messages, tokenize=False, **given) == expected


def test_the_library_is_not_changed() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for i in range(3) %}{{ 'a' * 2 }}{% endfor %}"
    limited_template(tokenizer)(MESSAGES, tokenize=False)
    from transformers.utils import chat_template_utils as library

    assert not library._compile_jinja_template(tokenizer.chat_template).environment.intercepted_binops


def test_the_first_rendering_that_is_too_slow_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 20_000)
    started: list[int] = []
    original = ChatRenderer.try_messages

    def try_messages(self: ChatRenderer, messages: Any) -> str | None:
        started.append(1)
        return original(self, messages)

    monkeypatch.setattr(ChatRenderer, "try_messages", try_messages)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    group = PreferenceGroup(MESSAGES[:1], [MESSAGES[1:], MESSAGES[1:]], style="chat", where="a:0")
    with pytest.raises(UserError, match="the chat template needs more than 20,000 loop iterations"):
        Encoder(tokenizer, TokenizeConfig()).encode(group)
    assert len(started) == 1
