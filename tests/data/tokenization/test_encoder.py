"""Encoding: the tokens that any server would make of the same text; control tokens in contents stay text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow
from tests.data.groups import chat_group, random_text, text_group, tokenized
from tests.small import make_tokenizer


@pytest.mark.slow
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
    assert Encoder(tokenizer, TokenizeConfig()).encode(group) == expected


def test_a_bos_token_is_neither_lost_nor_doubled() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    bos = tokenizer.bos_token_id
    for group in (text_group("a", "b"), text_group("<|im_start|>a", "<|im_start|>b"), chat_group("a", "b")):
        ids = Encoder(tokenizer, TokenizeConfig()).encode(group)[0]
        assert ids[0] == bos
        assert ids[1] != bos


def test_append_eos_closes_bare_texts_once(tokenizer: Any) -> None:
    ids = Encoder(tokenizer, TokenizeConfig(append_eos=True)).encode(text_group("a", "b<|im_end|>"))
    assert [row[-1] for row in ids] == [tokenizer.eos_token_id] * 2
    assert [len(row) for row in ids] == [2, 2]


def test_a_text_that_is_far_too_long_is_dropped_by_its_start(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = Encoder._encode_texts

    def watch(self: Encoder, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        sizes.extend(map(len, texts))
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(Encoder, "_encode_texts", watch)
    long = "ab " * 100_000
    for max_length in (10, 2000):
        sizes.clear()
        encoder = Encoder(tokenizer, TokenizeConfig(max_length=max_length))
        [found, other] = encoder.encode_many([text_group("short", long), text_group("short", "b")])
        assert isinstance(found, BadRow) and str(found) == f"longer than data.max_length={max_length}"
        assert max(sizes) <= 8 * 2 * 2000 and not isinstance(other, BadRow)
    whole = Encoder(tokenizer, TokenizeConfig(max_length=10, filter_overlong_prompts=False)).encode(text_group(long))
    assert whole == [tokenizer(long)["input_ids"]]
