"""Tokenizing: the tokens that any server would make of the same text, the length policies, the common prefix."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.data.dropped import BadRow, Dropped
from rm_gallery.data.token_data import TokenData, split_prefix
from rm_gallery.data.tokenize import TokenizeConfig, encode, load_tokenizer, tokenize_groups
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, InputStyle, PreferenceGroup
from tests.small import make_tokenizer, random_groups

PAIR = (Comparison(0, 1),)


def text_group(*responses: str, prompt: str = "", where: str = "a.parquet:0") -> PreferenceGroup:
    return PreferenceGroup(prompt, responses, PAIR, "text", where)


def chat_group(*responses: str, prompt: str = "hi", where: str = "a.parquet:0") -> PreferenceGroup:
    answers = [[{"role": "assistant", "content": response}] for response in responses]
    return PreferenceGroup([{"role": "user", "content": prompt}], answers, PAIR, "chat", where)


def tokenized(tokenizer: Any, *groups: PreferenceGroup, bad_rows: str = "drop", **options: Any) -> tuple[Any, Dropped]:
    dropped = Dropped()
    config = TokenizeConfig(**options)
    return tokenize_groups(groups, tokenizer, config, dropped=dropped, bad_rows=bad_rows), dropped


def texts_of(tokenizer: Any, data: TokenData) -> list[list[str]]:
    return [
        [tokenizer.decode([*group.prefix, *tail]) for tail in group.tails]
        for group in (data[i] for i in range(len(data)))
    ]


def random_text(draw: random.Random) -> str:
    letters = "ab \n\0\u00e9\u4f60\U0001f600"
    return "".join(draw.choice(letters) for _ in range(draw.randrange(1, 12)))


@pytest.mark.parametrize("encoder", [False, True])
def test_bare_texts_are_tokenized_as_the_tokenizer_does_alone(encoder: bool) -> None:
    tokenizer, draw = make_tokenizer(encoder=encoder), random.Random(0)
    for _ in range(200):
        prompt, good, bad = random_text(draw), random_text(draw), random_text(draw)
        if good == bad:
            continue
        data, _ = tokenized(tokenizer, text_group(good, bad, prompt=prompt))
        group = data[0]
        whole = [[*group.prefix.tolist(), *tail.tolist()] for tail in group.tails]
        assert whole == [tokenizer(prompt + good)["input_ids"], tokenizer(prompt + bad)["input_ids"]]


def test_chats_are_tokenized_whole_through_the_template(tokenizer: Any) -> None:
    group = chat_group("good", "bad")
    expected = [
        tokenizer.apply_chat_template([*group.prompt, *response], return_dict=False) for response in group.responses
    ]
    assert encode(group, tokenizer, TokenizeConfig()) == expected


def test_a_bos_token_is_neither_lost_nor_doubled() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    bos = tokenizer.bos_token_id
    for group in (text_group("a", "b"), text_group("<|im_start|>a", "<|im_start|>b"), chat_group("a", "b")):
        ids = encode(group, tokenizer, TokenizeConfig())[0]
        assert ids[0] == bos
        assert ids[1] != bos


def test_append_eos_closes_bare_texts_once(tokenizer: Any) -> None:
    ids = encode(text_group("a", "b<|im_end|>"), tokenizer, TokenizeConfig(append_eos=True))
    assert [row[-1] for row in ids] == [tokenizer.eos_token_id] * 2
    assert [len(row) for row in ids] == [2, 2]


def test_the_common_prefix_is_the_longest_that_leaves_each_response_a_token() -> None:
    for seed in range(200):
        draw = np.random.default_rng(seed)
        texts = [draw.integers(0, 2, draw.integers(1, 8)).tolist() for _ in range(draw.integers(2, 5))]
        group = split_prefix(texts, ())
        assert [[*group.prefix.tolist(), *tail.tolist()] for tail in group.tails] == texts
        assert min(len(tail) for tail in group.tails) >= 1
        size = len(group.prefix)
        if all(len(text) > size + 1 for text in texts):
            assert len({text[size] for text in texts}) > 1


def test_the_prefix_is_split_on_tokens_where_text_would_split_elsewhere() -> None:
    """ "ab" is one token here, so a prompt "a" is no prefix of the tokens of "ab"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend)
    data, _ = tokenized(merging, text_group("b", "c", prompt="ca"))
    group = data[0]
    assert group.prefix.tolist() == [2]
    assert [tail.tolist() for tail in group.tails] == [[3], [0, 2]]


def test_a_text_without_tokens_cannot_be_split() -> None:
    for texts in ([[]], [[1, 2], []]):
        with pytest.raises(BadRow, match="text without a token"):
            split_prefix(texts, ())


def test_flat_arrays_give_every_group_back() -> None:
    groups = random_groups(0)
    data = TokenData(((group, f"a:{number}") for number, group in enumerate(groups)), "text")
    assert len(data) == len(groups)
    for index, group in enumerate(groups):
        assert data[index].prefix.tolist() == group.prefix.tolist()
        assert [tail.tolist() for tail in data[index].tails] == [tail.tolist() for tail in group.tails]
        assert tuple(data[index].comparisons) == tuple(group.comparisons)
        assert data.sizes.tokens[index] == len(group.prefix) + sum(len(tail) for tail in group.tails)
        assert data.sizes.longest_text[index] == len(group.prefix) + max(len(tail) for tail in group.tails)


def test_the_fingerprint_tells_any_change_of_tokens_or_comparisons() -> None:
    groups = random_groups(0)
    whole = TokenData(((group, "") for group in groups), "text").fingerprint()
    assert whole == TokenData(((group, "elsewhere") for group in groups), "text").fingerprint()
    assert whole != TokenData(((group, "") for group in groups[::-1]), "text").fingerprint()
    assert whole != TokenData(((group, "") for group in groups[1:]), "text").fingerprint()


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
        "data.filter_overlong_prompts=true to leave such rows out, or data.truncation=left|right to cut them"
    )


def test_one_bad_row_costs_no_other_of_its_chunk(tokenizer: Any) -> None:
    groups = [text_group("a", "b"), text_group("\ud800", "b", where="a.parquet:1"), text_group("c", "d")]
    data, dropped = tokenized(tokenizer, *groups)
    assert texts_of(tokenizer, data) == [["a", "b"], ["c", "d"]]
    assert dropped.describe() == "1 half a character (a lone surrogate) in a text (first: a.parquet:1)"


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
    reason = "chat template refuses the conversation: roles must alternate"
    assert dropped.describe() == f"1 {reason} (first: a.parquet:0)"
    with pytest.raises(UserError, match=rf"^a\.parquet:0: {reason}; mend the row, or set data\.bad_rows=drop"):
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


def test_chats_mixed_with_bare_texts_stop_the_run_with_both_places(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"mix chat messages \(a\.parquet:0\) with bare texts \(a\.parquet:1\)"):
        tokenized(tokenizer, chat_group("a", "b"), text_group("a", "b", where="a.parquet:1"))


@pytest.mark.parametrize(("style", "group"), [("text", text_group("a", "b")), ("chat", chat_group("a", "b"))])
def test_the_data_know_their_style(tokenizer: Any, style: InputStyle, group: PreferenceGroup) -> None:
    assert tokenized(tokenizer, group)[0].style == style


def test_no_rows_give_empty_data(tokenizer: Any) -> None:
    data, _ = tokenized(tokenizer)
    assert len(data) == len(data.tokens) == 0


def test_a_model_folder_without_tokenizer_files_is_named(qwen2_folder: Path, tmp_path: Path) -> None:
    shutil.copy(qwen2_folder / "config.json", tmp_path)  # transformers makes an empty Qwen2Tokenizer of this
    with pytest.raises(UserError, match=r": there is no tokenizer; copy tokenizer\.json and tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_named(qwen2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^model\.partial_pretrain=.*: no tokenizer can be loaded from there \("):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_model_says_so(in_tmp: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.partial_pretrain=models/nope: neither a folder \(working directory "):
        load_tokenizer("models/nope")


def test_a_tilde_in_the_model_path_means_the_home_folder(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tokenizer_folder.parent))
    assert load_tokenizer(f"~/{tokenizer_folder.name}").is_fast


def test_a_chat_template_comes_as_text_or_from_a_file(tokenizer_folder: Path, in_tmp: Path) -> None:
    Path("own.jinja").write_text("{{ 1 }}")
    assert load_tokenizer(str(tokenizer_folder), chat_template="{{ 2 }}").chat_template == "{{ 2 }}"
    assert load_tokenizer(str(tokenizer_folder), chat_template="own.jinja").chat_template == "{{ 1 }}"
    with pytest.raises(UserError, match=r"^data\.chat_template=nope: neither a Jinja template nor a file"):
        load_tokenizer(str(tokenizer_folder), chat_template="nope")
