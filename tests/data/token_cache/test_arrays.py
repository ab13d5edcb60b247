"""Token data: the common prefix, and flat arrays that give every group back."""

from __future__ import annotations

import numpy as np
import pytest

from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, split_prefix
from rm_gallery.errors import BadRow
from tests.data.groups import text_group, tokenized
from tests.small import random_groups


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
    data = TokenData.from_groups((group, Origin("a", number)) for number, group in enumerate(groups))
    assert len(data) == len(groups)
    for index, group in enumerate(groups):
        assert data[index].prefix.tolist() == group.prefix.tolist()
        assert [tail.tolist() for tail in data[index].tails] == [tail.tolist() for tail in group.tails]
        assert tuple(data[index].comparisons) == tuple(group.comparisons)
        assert data.sizes.tokens[index] == len(group.prefix) + sum(len(tail) for tail in group.tails)
        assert data.sizes.longest_text[index] == len(group.prefix) + max(len(tail) for tail in group.tails)


def test_the_fingerprint_tells_any_change_of_tokens_or_comparisons() -> None:
    groups = random_groups(0)
    whole = TokenData.from_groups((group, Origin()) for group in groups).fingerprint()
    assert whole == TokenData.from_groups((group, Origin("elsewhere")) for group in groups).fingerprint()
    assert whole != TokenData.from_groups((group, Origin()) for group in groups[::-1]).fingerprint()
    assert whole != TokenData.from_groups((group, Origin()) for group in groups[1:]).fingerprint()
