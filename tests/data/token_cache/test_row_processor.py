"""Processing rows: length policy, bad rows, and what a chunk says of its data."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.schema import InputStyle, PreferenceGroup
from tests.data.groups import chat_group, random_text, text_group, texts_of, tokenized
from tests.small import make_tokenizer


@pytest.mark.parametrize(
    ("truncation", "length", "kept"),
    [("left", 1, "d z"), ("right", 1, "a x"), ("left", 3, "bcd xyz"), ("right", 3, "abc xyz"), ("left", 4, "abcd xyz")],
)
def test_truncation_keeps_the_last_or_first_tokens(tokenizer: Any, truncation: str, length: int, kept: str) -> None:
    data, dropped = tokenized(
        tokenizer, text_group("abcd", "xyz"), max_length=length, truncation=truncation, filter_overlong_prompts=False
    )
    assert texts_of(tokenizer, data) == [kept.split()]
    assert not dropped.counts


@pytest.mark.parametrize(
    ("truncation", "kept"), [("left", "[CLS]d[SEP] [CLS]z[SEP]"), ("right", "[CLS]a[SEP] [CLS]x[SEP]")]
)
def test_truncation_leaves_the_special_tokens_around_a_text(truncation: str, kept: str) -> None:
    encoder = make_tokenizer(encoder=True)
    data, _ = tokenized(
        encoder, text_group("abcd", "xyz"), max_length=3, truncation=truncation, filter_overlong_prompts=False
    )
    assert texts_of(encoder, data) == [kept.split()]


@pytest.mark.slow
def test_truncation_never_passes_the_length() -> None:
    for encoder in (False, True):
        tokenizer, draw = make_tokenizer(encoder=encoder), random.Random(0)
        for number in range(100):
            group = text_group(random_text(draw) + "1", random_text(draw) + "2")
            for truncation in ("left", "right"):
                length = 1 + number % 5
                data, dropped = tokenized(
                    tokenizer, group, max_length=length, truncation=truncation, filter_overlong_prompts=False
                )
                assert len(data) + dropped.total == 1
                assert not len(data) or data.sizes.longest_text[0] <= length


def test_a_pair_equal_after_truncation_is_left_out(tokenizer: Any) -> None:
    _, dropped = tokenized(
        tokenizer, text_group("same a", "same b"), max_length=4, truncation="right", filter_overlong_prompts=False
    )
    assert dropped.describe() == "1 chosen equal to rejected after truncation (first: a.parquet:0)"


def test_a_pair_equal_as_tokens_is_left_out(tokenizer: Any) -> None:
    _, dropped = tokenized(tokenizer, text_group("<|im_end|>", "", prompt="a"), append_eos=True)
    assert dropped.describe() == "1 chosen equal to rejected as tokens (first: a.parquet:0)"


def test_the_filter_leaves_long_groups_out_whole(tokenizer: Any) -> None:
    data, dropped = tokenized(tokenizer, text_group("a" * 5, "b"), text_group("c" * 4, "d"), max_length=4)
    assert texts_of(tokenizer, data) == [["cccc", "d"]]
    assert dropped.describe() == "1 longer than data.max_length=4 (first: a.parquet:0)"


def test_truncation_error_names_the_row_and_the_ways_out(tokenizer: Any) -> None:
    with pytest.raises(UserError) as error:
        tokenized(tokenizer, text_group("abcde", "b", where="a.parquet:7"), max_length=4, filter_overlong_prompts=False)
    assert str(error.value) == (
        "a.parquet:7: a text of 5 tokens is longer than data.max_length=4; raise it, set "
        "data.filter_overlong_prompts=true to drop such rows, or data.truncation=left|right to truncate them"
    )


def test_one_bad_row_costs_no_other_of_its_chunk(tokenizer: Any) -> None:
    groups = [text_group("a", "b"), text_group("\ud800", "b", where="a.parquet:1"), text_group("c", "d")]
    data, dropped = tokenized(tokenizer, *groups)
    assert texts_of(tokenizer, data) == [["a", "b"], ["c", "d"]]
    assert dropped.describe() == "1 text with a lone surrogate (first: a.parquet:1)"


def test_a_text_without_tokens_is_left_out(tokenizer: Any) -> None:
    _, dropped = tokenized(tokenizer, text_group("", "b"))
    assert dropped.describe() == "1 text without a token (first: a.parquet:0)"


def test_a_conversation_that_the_template_refuses_is_left_out() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'odd' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ messages[-1]['content'] }}"
    )
    groups = [chat_group("a", "b", prompt="odd"), chat_group("c", "d")]
    data, dropped = tokenized(tokenizer, *groups)
    assert texts_of(tokenizer, data) == [["c", "d"]]
    reason = "chat template rejects the conversation: roles must alternate"
    assert dropped.describe() == f"1 {reason} (first: a.parquet:0)"
    with pytest.raises(UserError, match=rf"^a\.parquet:0: {reason}; fix the row, or set data\.bad_rows=drop"):
        tokenized(tokenizer, *groups, bad_rows="error")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [(None, "a.parquet:0: the data are chat messages but the tokenizer has no chat template; set data.chat_template"),
     ("{% for m in %}", "the chat template is not valid Jinja (line 1: ")],
)  # fmt: skip
def test_chats_without_a_working_template_stop_the_run(template: str | None, sentence: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        tokenized(tokenizer, chat_group("a", "b"))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(("style", "group"), [("text", text_group("a", "b")), ("chat", chat_group("a", "b"))])
def test_the_data_know_their_style(tokenizer: Any, style: InputStyle, group: PreferenceGroup) -> None:
    assert tokenized(tokenizer, group)[0].style == style


def test_no_rows_give_empty_data(tokenizer: Any) -> None:
    data, _ = tokenized(tokenizer)
    assert len(data) == data.num_tokens == 0
