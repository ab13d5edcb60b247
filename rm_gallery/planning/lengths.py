"""How long the groups of a data set are: from a sample of its rows, or from stated averages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery.data.config import DataConfig
from rm_gallery.data.formats import Readers, RowCounts, read_groups
from rm_gallery.data.sources import Row, read_rows, resolve_files
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.token_cache.row_processor import RowProcessor, Work
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import Dropped, UserError
from rm_gallery.schema import PreferenceGroup

_SAMPLE_ROWS = 4000


@dataclass(frozen=True)
class Lengths:
    """A sample of groups that stands for the data set."""

    sizes: GroupSizes
    num_pairs: int
    """Comparisons of the whole data set in one epoch."""
    longest_group: int
    """Tokens; of the sample, or what `data.max_length` allows when there is none."""
    how: str
    """Where the figures come from, in words."""


def assumed_lengths(*, prompt: int, response: int, num_pairs: int, max_length: int) -> Lengths:
    """Pairs that are all alike: two responses to a prompt, in tokens; the longest is as long as may be."""
    sizes = _sizes([(prompt, response, response)] * 1024)
    how = f"assumed: {num_pairs:,} pairs of a {prompt}-token prompt and two {response}-token responses"
    return Lengths(sizes, num_pairs, 2 * max_length, how)


def read_lengths(config: DataConfig, *, tokenizer_folder: str | None, chars_per_token: float) -> Lengths:
    """Lengths from `data.train_files`: tokenized when there is a tokenizer, else characters by a stated ratio.

    Reads every row, and looks closely at 4,000 that are drawn evenly, always the same ones.
    Raises UserError for files that cannot be read and for data without a usable row.
    """
    key = "data.train_files"
    files = resolve_files(config, key=key)
    rows, total = _sample(read_rows(files, key=key))
    dropped = Dropped()
    if tokenizer_folder:
        tokenizer = load_tokenizer(tokenizer_folder, key="tokenizer", chat_template=config.chat_template)
        sizes = _tokenized(rows, config, tokenizer, dropped)
        how = f"tokens of the tokenizer in {tokenizer_folder}"
    else:
        counts = RowCounts(dropped=dropped)
        groups = [
            group
            for reader, some in Readers(config, has_chat_template=True).by_file(rows)
            for _, group, _ in read_groups(some, reader, counts, bad_rows=config.bad_rows)
        ]
        parts = [[round(chars / chars_per_token) for chars in group_chars(group)] for group in groups]
        sizes = _sizes([each for each in parts if each[0] + max(each[1:]) <= config.max_length])
        how = f"{chars_per_token:g} characters a token assumed (tokenizer=FOLDER counts them)"
    if not len(sizes):
        why = dropped.describe() or f"longer than data.max_length={config.max_length}"
        raise UserError(f"{key}: none of {total} rows can be used: {why}; mend the data, or raise data.max_length")
    share = f"a sample of {len(rows):,} of {total:,} rows" if len(rows) < total else f"{total:,} rows"
    num_pairs = round(total * int(sizes.num_comparisons.sum()) / len(rows))
    return Lengths(sizes, num_pairs, int(sizes.tokens.max()), f"{share}, {how}")


def _tokenized(rows: Sequence[Row], config: DataConfig, tokenizer: Any, dropped: Dropped) -> GroupSizes:
    """Sizes of the rows as training tokenizes them."""
    processor = RowProcessor(Work(config, tokenizer))
    parts = []
    for reader, some in processor.readers.by_file(rows):
        done = processor.process(some, reader, "")
        parts.append(done.chunk.arrays)
        dropped.merge(done.dropped)
    names = ("group_tokens", "longest_text", "num_responses", "num_comparisons")
    return GroupSizes(*(np.concatenate([part[name] for part in parts]).astype(np.int64) for name in names))


def _sample(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Up to 4,000 rows, each as likely as any other, in the order of the files, and how many there are.

    Reservoir sampling (Vitter 1985, algorithm R), so that memory stays flat.
    """
    draw = np.random.default_rng(0)
    kept: list[tuple[int, Row]] = []
    total = 0
    for total, row in enumerate(rows, start=1):
        if len(kept) < _SAMPLE_ROWS:
            kept.append((total, row))
        elif (place := int(draw.integers(total))) < _SAMPLE_ROWS:
            kept[place] = (total, row)
    return [row for _, row in sorted(kept, key=lambda item: item[0])], total


def group_chars(group: PreferenceGroup) -> list[int]:
    """Characters of the common prefix, then of each response's own part; roles and tags of a template not counted."""
    responses = [_text(response) for response in group.responses]
    first, last = min(responses), max(responses)  # what these two share, all share
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = next(differ, len(first)) if len(responses) > 1 else 0
    return [len(_text(group.prompt)) + shared, *(len(text) - shared for text in responses)]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(message.get("content") or "" for message in value)


def _sizes(parts: list[Any]) -> GroupSizes:
    """Sizes of pairs from (prefix, tail, tail); every tail has at least one token."""
    table = np.array(parts, np.int64).reshape(len(parts), -1 if parts else 3)  # [N, 1 + K]
    prefixes, tails = table[:, 0], np.maximum(1, table[:, 1:])
    ones = np.ones(len(parts), np.int64)
    return GroupSizes(
        tokens=prefixes + tails.sum(1),
        longest_text=prefixes + tails.max(1),
        num_responses=ones * tails.shape[1],
        num_comparisons=ones,
    )


def tokenizer_in(model: str) -> str | None:
    """The model's folder, or that of its configuration file, when it holds a fast tokenizer, else None."""
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    return str(folder) if (folder / "tokenizer.json").is_file() else None
