"""Which groups have the same prompt."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys

import pytest

from rm_gallery.data.formats import prompt_key
from rm_gallery.schema import Message, PreferenceGroup
from tests.data.formats.rows import assistant, system, user


def chat(prompt: list[Message], *responses: list[Message]) -> str:
    return prompt_key(PreferenceGroup(prompt, responses, style="chat"))


def text(prompt: str, *responses: str) -> str:
    return prompt_key(PreferenceGroup(prompt, responses, style="text"))


def test_a_prompt_is_the_same_wherever_it_stands() -> None:
    question = [system("short"), user("1 + 1?")]
    apart = chat(question, [assistant("2")], [assistant("3")])
    assert apart == chat([], [*question, assistant("2")], [*question, assistant("3")])
    assert apart == chat(question[:1], [question[1], assistant("4")], [question[1], assistant("5")])
    assert apart == chat([], [*question, assistant("2")])  # one response
    assert apart != chat(question[1:], [assistant("2")], [assistant("3")])


def test_who_speaks_counts_and_white_space_at_the_ends_does_not() -> None:
    assert chat([user(" hi\n")], [assistant("a")]) == chat([user("hi")], [assistant("b")])
    assert chat([user("h i")], [assistant("a")]) != chat([user("hi")], [assistant("a")])
    assert chat([system("hi")], [assistant("a")]) != chat([user("hi")], [assistant("a")])
    assert chat([user("a"), user("b")], [assistant("a")]) != chat([user("a\nb")], [assistant("a")])
    assert text(" hi\n", "a", "b") == text("hi", "c", "d")


def test_turns_that_the_responses_share_belong_to_the_prompt_but_never_the_last_one() -> None:
    shared = [assistant("x"), user("more")]
    whole = chat([user("hi")], [*shared, assistant("a")], [*shared, assistant("b")])
    assert whole == chat([user("hi"), *shared], [assistant("c")], [assistant("d")])
    parted = chat([user("hi")], [assistant("x"), user("more"), assistant("a")], [assistant("y"), user("more")])
    assert parted == chat([user("hi")], [assistant("c")], [assistant("d")])
    assert chat([user("hi")], [assistant("a")], [assistant("a"), user("b")]) == parted


def test_tool_calls_count() -> None:
    def key(name: str) -> str:
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name}}]}
        return chat([user("hi"), call], [assistant("a")])

    assert key("f") == key("f")
    assert key("f") != key("g")


def test_bare_texts_share_their_beginning_up_to_the_last_line_break() -> None:
    key = "Human: hi\n\nHuman: more"
    assert text("", f"\n\n{key}\n\nAssistant: yes", f"\n\n{key}\n\nAssistant: no") == key
    assert text("", f"\n\n{key}\n\nAssistant: good", f"\n\n{key}\n\nAssistant: bad") == key
    assert text("", f"{key}\nyes", f"{key}\nno", f"{key}\nyes!") == key
    assert text("", "a\nb", "a\nb") == "a"


def test_bare_texts_without_a_shared_line_have_the_key_of_their_flipped_copy() -> None:
    assert text("", "yes", "no") == text("", "no", "yes") == "no"
    assert text("", "\n\nHuman: a", "\n\nHuman: b") == "Human: a"  # a shared line that is empty is no prompt
    assert text("", "only") == "only"


def test_the_order_of_responses_never_counts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        beginning = "".join(rng.choices(string.ascii_lowercase[:2] + "\n", k=rng.randrange(6)))
        texts = [beginning + "".join(rng.choices("ab\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(2, 5))]
        expected = os.path.commonprefix([each.strip() for each in texts])  # noqa: RUF071 - by characters, as meant
        expected = expected[: expected.rfind("\n") + 1].strip() or min(each.strip() for each in texts)
        assert text("", *texts) == text("", *texts[::-1]) == expected


@pytest.mark.slow
def test_a_key_is_the_same_in_every_run() -> None:
    code = (
        "from rm_gallery.data.formats import prompt_key; from rm_gallery.schema import PreferenceGroup as G\n"
        "print(ascii(prompt_key(G([{'role': 'user', 'content': '\\u05e9', 'name': 'x'}], [[]], style='chat'))))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert keys == {ascii(chat([user("\u05e9")], [assistant("a")])) + "\n"}
