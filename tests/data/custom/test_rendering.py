"""Rendering: the text that scoring the messages gives, or a class's own; and what readers find out about it."""

from __future__ import annotations

import pytest

from rm_gallery.data.sources import Row
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Message
from tests.data.custom.classes import ROW, USER, Own, Plain, Templated, raising, reader_of, said, with_hook
from tests.small import make_tokenizer
from tests.templates import TEMPLATES, make_templated

CONVERSATIONS = [
    ([USER], said("So.")),
    ([USER], said(" So. \n")),
    ([USER, *said("<think>\nhm\n</think>\n\nBecause."), USER], said("<think>\nhm\n</think>\n\nSo.")),
    ([USER], [*said("So."), USER, *said("No.")]),
    ([], said("So.")),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("dataset_class", [Plain, Templated])
def test_what_the_template_writes_is_written_by_the_template(name: str, dataset_class: type) -> None:
    tokenizer = make_templated(name)
    reader = reader_of(dataset_class, tokenizer)
    assert tokenizer.chat_template is None or reader.style == "chat"
    for prompt, response in CONVERSATIONS:
        text = reader.render(prompt, response)
        if tokenizer.chat_template is not None:
            assert text == tokenizer.apply_chat_template([*prompt, *response], tokenize=False)
        else:
            contents = [message["content"] for message in [*prompt, *response]]
            bos = tokenizer.bos_token or ""
            assert text == bos + "\n\n".join(contents) + tokenizer.eos_token
            assert (reader.style, reader.append_eos, reader.separator) == ("text", True, "\n\n")
    assert reader.matches_template
    assert reader.facts.warnings() == []


@pytest.mark.parametrize(
    ("name", "closing"),
    [
        ("chatml", "<|im_end|>\n"),
        ("qwen3", "<|im_end|>\n"),
        ("inst", " <|im_end|>"),
        ("none", "<|im_end|>"),
        ("none_with_bos", "<|im_end|>"),
    ],
)
def test_a_format_of_its_own_is_closed_as_the_template_closes(name: str, closing: str) -> None:
    tokenizer = make_templated(name)
    reader = reader_of(Own, tokenizer)
    bos = tokenizer.bos_token or ""
    assert reader.render([USER], said("So.")) == f"{bos}User: Why?\nBot: So.{closing}"
    assert reader.render([USER, *said("So."), USER], said("No.")) == (
        f"{bos}User: Why?\nAssistant: So.\nUser: Why?\nBot: No.{closing}"
    )
    assert reader.render([], said("So.")) == f"{bos}Bot: So.{closing}"
    assert not reader.matches_template
    [warning] = reader.facts.warnings()
    assert warning.startswith("data.custom_cls: _apply_chat_template differs from the chat ")


def test_a_hook_that_renders_without_the_generation_prompt_still_is_the_template() -> None:
    tokenizer = make_tokenizer()
    bare = with_hook("_apply_chat_template", lambda turns: tokenizer.apply_chat_template(turns, tokenize=False))
    reader = reader_of(bare, tokenizer)
    assert reader.render([USER], said("So.")) == tokenizer.apply_chat_template([USER, *said("So.")], tokenize=False)
    assert reader.matches_template


def test_a_hook_that_opens_the_reasoning_block_itself_still_is_the_template() -> None:
    tokenizer = make_templated("qwen3")
    block = "<think>\n\n</think>\n\n"
    written = Templated((), tokenizer, None)._apply_chat_template
    opening = with_hook("_apply_chat_template", lambda turns: written(turns) + block)
    reader = reader_of(opening, tokenizer)
    assert reader.render([USER], said("So.")) == tokenizer.apply_chat_template([USER, *said("So.")], tokenize=False)
    assert reader.matches_template


def test_a_hook_may_change_the_messages_it_is_given() -> None:
    def add_system(messages: list[Message]) -> str:
        messages.insert(0, {"role": "system", "content": "Be kind."})
        messages[1]["content"] += "!"
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    tokenizer = make_tokenizer()
    reader = reader_of(with_hook("_apply_chat_template", add_system), tokenizer)
    prompt = [dict(USER)]
    texts = [reader.render(prompt, said(answer)) for answer in ("So.", "No.")]
    whole = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?!"}]
    for text, answer in zip(texts, ("So.", "No."), strict=True):
        assert text == tokenizer.apply_chat_template([*whole, *said(answer)], tokenize=False)
    assert prompt == [USER]
    assert not reader.matches_template


def test_a_hook_that_cannot_render_names_itself_and_the_row() -> None:
    with pytest.raises(
        UserError, match=r"^b\.parquet:1: Made\._apply_chat_template raised RuntimeError: first line second line \("
    ):
        reader_of(with_hook("_apply_chat_template", raising)).render([USER], said("So."), where="b.parquet:1")
    with pytest.raises(
        UserError, match=r"^Made\._apply_chat_template returned list instead of text \(tokenize=False gives"
    ):
        reader_of(with_hook("_apply_chat_template", lambda _: [1, 2])).render([USER], said("So."))


def test_a_conversation_that_the_template_refuses_is_a_bad_row_in_a_hook_too() -> None:
    for dataset_class in (Plain, Templated):
        reader = reader_of(dataset_class, make_templated("inst"))
        with pytest.raises(
            BadRow, match=r"^chat template rejects the conversation: Only user and assistant roles are "
        ):
            reader.render([{"role": "system", "content": "x"}, USER], said("So."))


def test_a_hook_may_render_what_the_template_refuses() -> None:
    reader = reader_of(Own, make_templated("inst"))
    system = {"role": "system", "content": "x"}
    assert "System: x\nUser: Why?\nBot: So. <|im_end|>" in reader.render([system, USER], said("So."))


@pytest.mark.parametrize("dataset_class", [Plain, Templated])
def test_a_broken_template_is_named(dataset_class: type) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in %}"
    with pytest.raises(UserError, match=r"^the chat template is not valid Jinja \(line 1: "):
        reader_of(dataset_class, tokenizer).render([USER], said("So."))


def test_calls_of_tools_need_the_template() -> None:
    calls = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    assert reader_of(Plain).render([USER], calls).endswith("<|im_start|>assistant\n<|im_end|>\n")
    with pytest.raises(BadRow, match=r"^response without text, which only the chat template can write$"):
        reader_of(Own).render([USER], calls)


def test_an_encoder_gets_its_own_tokens_around_the_text() -> None:
    tokenizer = make_tokenizer(encoder=True)
    reader = reader_of(Templated, tokenizer)
    group = reader.read(Row(ROW, "a.parquet", 0))
    expected = [tokenizer(f"Why?\n\n{answer}")["input_ids"] for answer in ("So.", "No.")]
    assert Encoder(tokenizer, TokenizeConfig(), render=reader.render).encode(group) == expected
    assert not reader.append_eos


def test_empty_prompts_everywhere_are_worth_a_warning() -> None:
    reader = reader_of(Plain)
    reader.read(Row({**ROW, "query": " "}, "a.parquet", 0))
    [warning] = reader.facts.warnings()
    assert warning.startswith("data.custom_cls: every prompt is empty (1 rows); check that _build_messages reads ")
    reader.read(Row(ROW, "a.parquet", 1))
    assert reader.facts.warnings() == []


def test_facts_of_several_processes_add_up() -> None:
    first, second = reader_of(Own), reader_of(Own)
    first.read(Row({**ROW, "query": ""}, "a.parquet", 0))
    second.render([USER], said("So."))
    total = first.facts
    total.add(second.facts)
    assert (total.num_prompts, total.num_empty_prompts, total.matches_template) == (1, 1, False)
    assert first.facts.matches_template
