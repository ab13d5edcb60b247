"""Groups for the tests of the data path, and the way from groups to tokens without files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from rm_gallery.data.sources import Row
from rm_gallery.data.token_cache.arrays import GroupSizes, TokenData, with_starts
from rm_gallery.data.token_cache.row_processor import RowProcessor, RowsConfig, Work
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import Dropped
from rm_gallery.schema import Comparison, PreferenceGroup

PAIR = (Comparison(0, 1),)


def token_group(prefix: Sequence[int], tails: Sequence[Sequence[int]], *comparisons: Comparison) -> TokenGroup:
    """A group of these tokens; by default its first response beats its second."""
    arrays = [np.array(tail, np.int32) for tail in tails]
    return TokenGroup(np.array(prefix, np.int32), arrays, list(comparisons) or PAIR)


def random_sizes(seed: int, num_groups: int, *, responses: tuple[int, int] = (2, 2)) -> GroupSizes:
    """Groups of K responses with K - 1 comparisons, texts of 1 to 100 tokens."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(responses[0], responses[1] + 1, num_groups)
    longest = draw.integers(1, 101, num_groups)
    tokens = np.array([draw.integers(size, size * count + 1) for size, count in zip(longest, counts, strict=True)])
    return GroupSizes(tokens.astype(np.int64), longest, counts, counts - 1)


def text_group(*responses: str, prompt: str = "", where: str = "a.parquet:0") -> PreferenceGroup:
    return PreferenceGroup(prompt, responses, PAIR, "text", where)


def chat_group(*responses: str, prompt: str = "hi", where: str = "a.parquet:0") -> PreferenceGroup:
    answers = [[{"role": "assistant", "content": response}] for response in responses]
    return PreferenceGroup([{"role": "user", "content": prompt}], answers, PAIR, "chat", where)


class GivenGroups:
    """A reader of rows that hold their group."""

    def read(self, row: Row) -> PreferenceGroup:
        return row.values["group"]


def tokenized(tokenizer: Any, *groups: PreferenceGroup, **options: Any) -> tuple[TokenData, Dropped]:
    """Groups through everything that happens to a chunk of rows."""
    rows = []
    for group in groups:
        file, _, index = group.where.rpartition(":")
        rows.append(Row({"group": group}, file, int(index)))
    done = RowProcessor(Work(RowsConfig(**options), tokenizer)).process(rows, GivenGroups(), "")
    style = next(iter(done.styles), "text")
    data = TokenData(with_starts(done.chunk.arrays), files=done.chunk.files, sources=done.chunk.sources, style=style)
    return data, done.dropped


def texts_of(tokenizer: Any, data: TokenData) -> list[list[str]]:
    return [
        [tokenizer.decode([*group.prefix, *tail]) for tail in group.tails]
        for group in (data[i] for i in range(len(data)))
    ]


def random_text(draw: random.Random) -> str:
    letters = "ab \n\0\u00e9\u4f60\U0001f600"
    return "".join(draw.choice(letters) for _ in range(draw.randrange(1, 12)))
