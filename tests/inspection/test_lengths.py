"""Encoders, the length policy, lengths and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rm_gallery.data.dropped import Dropped
from rm_gallery.data.packing import PackingConfig
from rm_gallery.data.tokenize import TokenizeConfig
from rm_gallery.inspection.encoders import TokenEncoder, WordEncoder
from rm_gallery.inspection.lengths import cost_report, histogram, length_report
from rm_gallery.inspection.measure import Lengths, LengthsBuilder, measure
from rm_gallery.schema import Comparison, PreferenceGroup
from tests.inspection.made import pair, pairs, table_of


def _text_pair(prompt: str, *texts: str, row: int = 0) -> PreferenceGroup:
    return PreferenceGroup(prompt, texts, (Comparison(0, 1),), where=f"f:{row}")


def _measure(groups: list[PreferenceGroup], encoder: Any) -> tuple[list[PreferenceGroup], Lengths, Dropped]:
    lengths, dropped = LengthsBuilder(), Dropped()
    kept = list(measure(groups, encoder, lengths=lengths, dropped=dropped))
    return kept, lengths.finish(), dropped


def test_lengths_are_those_that_training_sees(tokenizer: Any) -> None:
    group = pair("Hi", "good", "bad one")
    _, lengths, _ = _measure([group], TokenEncoder(tokenizer, TokenizeConfig()))
    wholes = [
        len(tokenizer.apply_chat_template([*group.prompt, *answer], tokenize=True)["input_ids"])
        for answer in group.responses
    ]
    assert (lengths.prefix[0] + lengths.tails).tolist() == wholes
    assert lengths.longest.tolist() == [max(wholes)]


def test_long_rows_are_left_out_but_counted(tokenizer: Any) -> None:
    groups = [_text_pair("", "a" * 5, "b", row=0), _text_pair("", "a" * 30, "b", row=1)]
    kept, lengths, dropped = _measure(groups, TokenEncoder(tokenizer, TokenizeConfig(max_length=10)))
    assert [each.where for each in kept] == ["f:0"]
    assert dropped.counts == {"longer than data.max_length=10": 1}
    assert (lengths.longest.tolist(), lengths.is_kept.tolist()) == ([5, 30], [True, False])


@pytest.mark.parametrize(("truncation", "longest"), [("left", 10), ("error", 30)])
def test_cut_or_refused_rows_stay_and_are_named(tokenizer: Any, truncation: Any, longest: int) -> None:
    config = TokenizeConfig(max_length=10, filter_overlong_prompts=False, truncation=truncation)
    groups = [_text_pair("", "a" * 5, "b", row=0), _text_pair("", "a" * 30, "b", row=1)]
    kept, lengths, _ = _measure(groups, TokenEncoder(tokenizer, config))
    report = length_report(lengths, table_of(kept), unit="tokens", max_length=10, long_texts="cut")
    assert (report.num_beyond, report.examples) == (1, ("f:1",))
    assert lengths.prefix[1] + lengths.tails.max() == longest


def test_a_row_that_cannot_be_rendered_is_left_out_alone(tokenizer: Any) -> None:
    groups = [_text_pair("", "a", "b", row=0), _text_pair("", "\ud800", "b", row=1), _text_pair("", "c", "d", row=2)]
    kept, _, dropped = _measure(groups, TokenEncoder(tokenizer, TokenizeConfig()))
    assert [each.where for each in kept] == ["f:0", "f:2"]
    assert dropped.examples == {"half a character (a lone surrogate) in a text": "f:1"}


def test_equal_texts_are_left_out_as_in_training(tokenizer: Any) -> None:
    _, _, dropped = _measure([_text_pair("", "a", "a")], TokenEncoder(tokenizer, TokenizeConfig()))
    assert dropped.total == 1


def test_words_stand_in_for_tokens() -> None:
    encoder = WordEncoder()
    group = _text_pair("What is  it?\n", "It is so.", "It is\nnot so. ")
    texts = encoder.encode([group])[0]
    assert [len(ids) for ids in texts] == [7, 9]
    assert texts[0][:5] == texts[1][:5]
    for ids, response in zip(texts, group.responses, strict=True):
        assert "".join(piece.text for piece in encoder.pieces(ids, group)) == f"{group.prompt}{response}"


def test_pieces_put_together_are_the_text(tokenizer: Any) -> None:
    text = "<|im_start|>user\nd\u00e9j\u00e0 \U0001f60a \u6211<|im_end|>"
    group = _text_pair("", text, "b")
    encoder = TokenEncoder(tokenizer, TokenizeConfig())
    pieces = encoder.pieces(encoder.encode([group])[0][0], group)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.text for piece in pieces if piece.special] == ["<|im_end|>"]
    assert [len(piece.ids) for piece in pieces if piece.text == "\U0001f60a"] == [4]


def test_pieces_that_begin_or_end_within_a_character_end_all_the_same(tokenizer: Any) -> None:
    group = _text_pair("", "\U0001f60a" * 3, "b")
    encoder = TokenEncoder(tokenizer, TokenizeConfig())
    ids = encoder.encode([group])[0][0][1:-1]
    assert sum(len(piece.ids) for piece in encoder.pieces(ids, group)) == len(ids)


def _lengths(*groups: tuple[int, list[int]]) -> Lengths:
    builder = LengthsBuilder()
    for prefix, tails in groups:
        builder.saw(prefix + max(tails))
        builder.keep(prefix, tails)
    return builder.finish()


def test_costs_by_hand() -> None:
    lengths = _lengths((10, [1, 2]), (0, [5, 3]))
    report = cost_report(
        lengths, table_of(pairs(("p", "a", "b"), ("q", "a", "b"))), unit="tokens", max_length=20,
        packing=PackingConfig(train_batch_size=2), token_budget=13, seed=0, pads=False,
    )  # fmt: skip
    assert report.packed == 13 + 8
    assert report.separate == 11 + 12 + 5 + 3
    assert report.padded_batch == 4 * 12
    assert report.padded_max == 4 * 20
    assert report.micro_batches == 2


def test_a_model_that_pads_is_charged_for_padding() -> None:
    lengths = _lengths((10, [1, 2]), (0, [5, 3]))
    report = cost_report(
        lengths, table_of(pairs(("p", "a", "b"), ("q", "a", "b"))), unit="tokens", max_length=20,
        packing=PackingConfig(train_batch_size=2), token_budget=24, seed=0, pads=True,
    )  # fmt: skip
    assert report.packed == 2 * 12 + 2 * 5


def test_a_row_beyond_the_budget_leaves_the_micro_batches_open() -> None:
    table = table_of(pairs(("p", "a", "b")))
    report = cost_report(
        _lengths((10, [1, 2])), table, unit="tokens", max_length=20, packing=PackingConfig(), token_budget=5, seed=0,
        pads=False,
    )  # fmt: skip
    assert (report.micro_batches, report.packed) == (None, 13)


@pytest.mark.parametrize("values", [[0], [5, 5, 5], list(range(1000)), [1] * 200 + [10**7], [3, 10_000]])
def test_histograms_count_everything_once(values: list[int]) -> None:
    found = histogram(np.array(values))
    assert sum(found.counts) == len(values)
    assert len(found.edges) == len(found.counts) <= 14
    assert found.edges[0] <= min(values)
    assert (
        [high - low for low, high in zip(found.edges, found.edges[1:], strict=False)]
        == [found.edges[1] - found.edges[0]] * (len(found.edges) - 1)
        if len(found.edges) > 1
        else True
    )
