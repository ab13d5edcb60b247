"""Custom classes: what their hooks give becomes groups and text, and what they do wrong names hook, file and row."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from typing import Any

import pytest

from rm_gallery.data.custom import CustomReader, DataSection
from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats import CustomClassConfig, FormatConfig
from rm_gallery.data.source import Row
from rm_gallery.data.tokenize import TokenizeConfig, encode
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, Message, PreferenceGroup
from tests.small import make_tokenizer
from tests.templates import TEMPLATES, make_templated

ROW = {"query": "Why?", "chosen": "So.", "rejected": "No."}
PAIR = (Comparison(0, 1),)
USER = {"role": "user", "content": "Why?"}


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


class Plain:
    """The least that a class needs; no base class."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config

    def _build_messages(self, example: dict[str, Any]) -> Any:
        return [{"role": "user", "content": example.get("query", "")}]


class Templated(Plain):
    def _apply_chat_template(self, messages: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Own(Plain):
    """A format of its own, which no template writes."""

    def _apply_chat_template(self, messages: Any) -> Any:
        return "".join(f"{message['role'].title()}: {message['content']}\n" for message in messages) + "Bot: "


def with_hook(name: str, hook: Any, base: type = Plain) -> type:
    """A class whose hook is this function of its argument."""
    return type("Made", (base,), {name: lambda self, argument: hook(argument)})


def reader_of(dataset_class: type = Plain, tokenizer: Any = None, **options: Any) -> CustomReader:
    return CustomReader(dataset_class, FormatConfig(**options), tokenizer or make_tokenizer())


def read(dataset_class: type, row: dict[str, Any] | None = None, **options: Any) -> PreferenceGroup:
    return reader_of(dataset_class, **options).read(Row(dict(ROW if row is None else row), "a.parquet:3"))


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
    ],
)
def test_a_row_that_holds_too_little_is_a_bad_row(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        read(Plain, {**ROW, **changes})
    assert str(error.value) == reason


def test_a_row_without_a_column_is_a_bad_row_that_names_the_key() -> None:
    with pytest.raises(BadRow, match=r"^no column 'better' \(data\.chosen_key\)$"):
        read(Plain, chosen_key="better")


def raising(_: Any) -> Any:
    raise RuntimeError("first line\nsecond line")


HOOKS = ("_build_messages", "_extract_ground_truth", "_get_data_source", "build_group")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_names_itself_file_and_row(hook: str) -> None:
    with pytest.raises(UserError) as error:
        read(with_hook(hook, raising))
    assert str(error.value).startswith(f"a.parquet:3: Made.{hook} raised RuntimeError: first line (test_custom.py:")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, RuntimeError), "--debug shows where"


def test_a_hook_that_misses_a_column_names_those_there_are() -> None:
    with pytest.raises(UserError) as error:
        read(with_hook("_build_messages", lambda row: row["question"]))
    assert "KeyError: 'question'" in str(error.value)
    assert str(error.value).endswith("; correct the hook (columns of the row: query, chosen, rejected)")


@pytest.mark.parametrize(
    ("hook", "value", "sentence"),
    [
        ("_build_messages", "Why?", "gave str instead of a list of messages (mappings with role and content)"),
        ("_build_messages", None, "gave NoneType instead of a list of messages"),
        ("_build_messages", ["Why?"], "gave a list with str in it instead of a list of messages"),
        ("_get_data_source", 5, "gave int instead of text"),
        ("_extract_ground_truth", datetime.date(2000, 1, 1), "gave date instead of a plain JSON value as ground_truth"),
        ("_extract_ground_truth", {"a": {1}}, "gave dict instead of a plain JSON value as ground_truth"),
        ("build_group", "text", "gave str instead of a PreferenceGroup, None or (None, reason)"),
        ("build_group", (None, 5), "gave tuple instead of a PreferenceGroup"),
        ("build_group", PreferenceGroup("a", "bc", PAIR), "gave str instead of a list of responses"),
        ("build_group", PreferenceGroup(5, ["b", "c"], PAIR), "gave int instead of a list of messages"),
        ("build_group", PreferenceGroup("a", ["b", "c"], ((0, 1),)), "gave tuple instead of a Comparison"),
        ("build_group", PreferenceGroup("a", ["b", "c"], (Comparison(0, 2),)),
         "compares response 0 with 2, of 2 that count from 0"),
        ("build_group", PreferenceGroup("a", ["b", "c"], (Comparison(1, 1),)), "compares response 1 with 1, of 2"),
    ],
)  # fmt: skip
def test_a_hook_that_gives_something_else_names_itself_file_and_row(hook: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        read(with_hook(hook, lambda _: value))
    assert str(error.value).startswith(f"a.parquet:3: Made.{hook} {sentence}")
    assert str(error.value).endswith("; correct the hook")


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
        (None, "left out by build_group"),
        ((None, "no votes"), "no votes"),
        (PreferenceGroup("a", ["b", "c"]), "no comparison between its responses"),
        (PreferenceGroup("a", ["b", " "], PAIR), "empty response"),
        (PreferenceGroup([USER], ["b", " "], PAIR), "empty response"),
        (PreferenceGroup([USER], ["b", None], PAIR), "null response"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, weight=float("nan")),)),
         "a weight that is not a finite number of at least 0"),
        (PreferenceGroup("a", ["b", "c"], (Comparison(0, 1, weight=-1),)),
         "a weight that is not a finite number of at least 0"),
    ],
)  # fmt: skip
def test_a_row_that_build_group_cannot_use_is_counted_by_reason(made: Any, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        read(with_hook("build_group", lambda _: made))
    assert str(error.value) == reason


def test_hooks_fill_in_what_build_group_leaves_open() -> None:
    made = {"group": PreferenceGroup([USER], ["a", "b"], PAIR)}
    sourced = with_hook("_get_data_source", lambda _: "hook", with_hook("build_group", lambda _: made["group"]))
    both = with_hook("_extract_ground_truth", lambda _: "hook", sourced)
    assert (read(both).source, read(both).metadata) == ("hook", {"ground_truth": "hook"})
    made["group"] = replace(made["group"], source="own", metadata={"ground_truth": 1, "id": 7})
    assert (read(both).source, read(both).metadata) == ("own", {"ground_truth": 1, "id": 7})


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
    assert warning.startswith("data.custom_cls: _apply_chat_template writes something else than ")


def test_a_hook_that_renders_without_the_generation_prompt_still_is_the_template() -> None:
    tokenizer = make_tokenizer()
    bare = with_hook("_apply_chat_template", lambda turns: tokenizer.apply_chat_template(turns, tokenize=False))
    reader = reader_of(bare, tokenizer)
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
        UserError, match=r"^b\.parquet:1: Made\._apply_chat_template raised RuntimeError: first line \("
    ):
        reader_of(with_hook("_apply_chat_template", raising)).render([USER], said("So."), where="b.parquet:1")
    with pytest.raises(
        UserError, match=r"^Made\._apply_chat_template gave list instead of text \(tokenize=False gives"
    ):
        reader_of(with_hook("_apply_chat_template", lambda _: [1, 2])).render([USER], said("So."))


def test_a_conversation_that_the_template_refuses_is_a_bad_row_in_a_hook_too() -> None:
    for dataset_class in (Plain, Templated):
        reader = reader_of(dataset_class, make_templated("inst"))
        with pytest.raises(
            BadRow, match=r"^chat template refuses the conversation: Only user and assistant roles are "
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
    group = reader.read(Row(ROW, "a.parquet:0"))
    expected = [tokenizer(f"Why?\n\n{answer}")["input_ids"] for answer in ("So.", "No.")]
    assert encode(group, tokenizer, TokenizeConfig(), reader.render) == expected
    assert not reader.append_eos


def test_empty_prompts_everywhere_are_worth_a_warning() -> None:
    reader = reader_of(Plain)
    reader.read(Row({**ROW, "query": " "}, "a.parquet:0"))
    [warning] = reader.facts.warnings()
    assert warning.startswith("data.custom_cls: every prompt is empty (1 rows); does _build_messages read a column")
    reader.read(Row(ROW, "a.parquet:1"))
    assert reader.facts.warnings() == []


def test_facts_of_several_processes_add_up() -> None:
    first, second = reader_of(Own), reader_of(Own)
    first.read(Row({**ROW, "query": ""}, "a.parquet:0"))
    second.render([USER], said("So."))
    total = first.facts
    total.add(second.facts)
    assert (total.num_prompts, total.num_empty_prompts, total.matches_template) == (1, 1, False)
    assert first.facts.matches_template


def test_the_data_section_reads_as_attributes_items_and_with_get() -> None:
    section = DataSection(FormatConfig(chosen_key="good", custom_cls=CustomClassConfig("a.py", "A")))
    assert (section.chosen_key, section["chosen_key"], section.get("chosen_key")) == ("good",) * 3
    assert (section.custom_cls.name, section["custom_cls"]["path"]) == ("A", "a.py")
    assert (section.get("nothing", 5), "nothing" in section, len(section) == len(dict(section))) == (5, False, True)
    with pytest.raises(AttributeError, match=r"^the data section has no key 'nothing'$"):
        _ = section.nothing
    assert DataSection({"max_length": 7}).max_length == 7
    assert DataSection().rejected_key == "rejected"
