"""A sample that represents the whole dataset, as token data: from its rows, or from assumed lengths.

Training's own code reads and tokenizes the rows, so the sample can be planned like a real dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery.data.batching.plan import Mixture
from rm_gallery.data.config import DataConfig, mixture_of
from rm_gallery.data.formats import Readers, RowCounts, Task, iter_tasks, read_groups
from rm_gallery.data.sources import Row, entries_of, resolve_files
from rm_gallery.data.token_cache.arrays import ARRAYS, TokenChunk, TokenData, make_chunk, with_starts
from rm_gallery.data.token_cache.row_processor import RowProcessor, Work
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, split_prefix
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import BadRow, UserError
from rm_gallery.sampling import Reservoir
from rm_gallery.schema import Comparison, PreferenceGroup

_KEY = "data.train_files"
_MAX_ROWS = 4000
_BLOCK_ROWS = 16
_ASSUMED_PAIRS = 1024


@dataclass(frozen=True)
class Sample:
    """Groups that represent the dataset."""

    data: TokenData
    num_pairs: int
    """Comparisons of the whole dataset in one epoch."""
    longest_group: int
    """Tokens; of the sample, or what `data.max_length` allows when there is no data."""
    how: str
    """Where the lengths come from, for the report."""
    mixture: Mixture | None = None
    """How often each group is used in an epoch; None for once."""


@dataclass(frozen=True)
class _Drawn:
    """Rows that follow each other in a file, and how the file is read; see `Task`."""

    format_name: str
    source: str
    rows: list[Row]


def assumed_sample(*, prompt: int, response: int, num_pairs: int, max_length: int) -> Sample:
    """Equal pairs: a prompt and two responses, in tokens. No two pairs have the same prompt."""
    group = TokenGroup(np.zeros(prompt, np.int32), [np.zeros(response, np.int32)] * 2, (Comparison(0, 1),))
    data = TokenData.from_groups((group, Origin(row=row, prompt_hash=row)) for row in range(_ASSUMED_PAIRS))
    how = f"assumed: {num_pairs:,} pairs of a {prompt}-token prompt and two {response}-token responses"
    return Sample(data, num_pairs, 2 * max_length, how)


def read_sample(config: DataConfig, *, tokenizer_folder: str | None, chars_per_token: float) -> Sample:
    """A sample of `data.train_files`: tokenized if there is a tokenizer, else by characters per token.

    Reads every row and keeps 4,000, drawn uniformly with a fixed seed.
    Raises UserError for files that cannot be read and for data without a usable row.
    """
    tokenizer: Any = None
    if tokenizer_folder:  # before the data, which may take long
        tokenizer = load_tokenizer(tokenizer_folder, key="tokenizer", chat_template=config.chat_template)
    files, entries = resolve_files(config, key=_KEY), entries_of(config, _KEY)
    # Rows that follow each other often have the same prompt. Where a step holds such rows, they are drawn in blocks.
    block = 1 if config.shuffle and not config.keep_prompts_together else _BLOCK_ROWS
    drawn, total = _draw(iter_tasks(files, entries, config, _KEY, set()), block)
    num_rows = sum(len(each.rows) for each in drawn)
    counts = RowCounts()
    if tokenizer is not None:
        chunks = list(_tokenize(drawn, config, tokenizer, counts))
        how = f"tokens of the tokenizer in {tokenizer_folder}"
    else:
        chunks = list(_count_characters(drawn, config, chars_per_token, counts))
        how = f"{chars_per_token:g} characters per token assumed (tokenizer=FOLDER counts them)"
    data = _concatenate(chunks)
    if not len(data):
        raise UserError(
            f"{_KEY}: none of {total} rows can be used: {counts.dropped.describe()}; fix the data, or raise "
            "data.max_length"
        )
    mixture = mixture_of(data, files, config)
    groups = slice(None) if mixture is None else mixture.groups(seed=0, epoch=0)
    num_pairs = round(total * int(data.sizes.num_comparisons[groups].sum()) / num_rows)
    share = f"a sample of {num_rows:,} of {total:,} rows" if num_rows < total else f"{total:,} rows"
    return Sample(data, num_pairs, int(data.sizes.tokens.max()), f"{share}, {how}", mixture)


def _draw(tasks: Iterable[Task], block: int) -> tuple[list[_Drawn], int]:
    """Blocks of rows in the order of the files, drawn uniformly, and the number of all rows."""
    drawn: Reservoir[_Drawn] = Reservoir(_MAX_ROWS // block, seed=0)
    total = 0
    for task in tasks:
        rows = iter(task.chunk.rows())
        while some := list(islice(rows, block)):
            total += len(some)
            if (place := drawn.wants()) is not None:
                drawn.put(place, _Drawn(task.format_name, task.source, some))
    joined = []
    for (format_name, source), blocks in groupby(drawn.in_order(), key=lambda each: (each.format_name, each.source)):
        joined.append(_Drawn(format_name, source, list(chain.from_iterable(each.rows for each in blocks))))
    return joined, total


def _tokenize(drawn: Iterable[_Drawn], config: DataConfig, tokenizer: Any, counts: RowCounts) -> Iterator[TokenChunk]:
    """The rows as training tokenizes them."""
    processor = RowProcessor(Work(config, tokenizer))
    for each in drawn:
        done = processor.process(each.rows, processor.readers.get(each.format_name), each.source)
        counts.dropped.merge(done.dropped)
        yield done.chunk


def _count_characters(
    drawn: Iterable[_Drawn], config: DataConfig, chars_per_token: float, counts: RowCounts
) -> Iterator[TokenChunk]:
    """The rows with runs of characters for tokens; texts that begin alike have the same tokens there.

    Roles and tags of a chat template are not counted.
    """
    readers = Readers(config, has_chat_template=True)
    ids: dict[str, int] = {}
    for each in drawn:
        groups, reader = [], readers.get(each.format_name)
        for row, group, prompt in read_groups(each.rows, reader, counts, bad_rows=config.bad_rows):
            texts = [_split_characters(text, chars_per_token, ids) for text in _texts(group)]
            try:
                tokens = split_prefix(_fit(texts, config), group.comparisons, group.ratings)
            except BadRow as error:
                counts.drop(error, row.where, "drop")  # only an estimate: training decides
                continue
            groups.append((tokens, Origin(row.file, row.index, group.source or each.source, prompt)))
        yield make_chunk(groups)


def _split_characters(text: str, chars_per_token: float, ids: dict[str, int]) -> list[int]:
    """At least one number per text, equal ones for equal runs of characters.

    Example: with 2.5 characters per token "abcdefgh" has 8 / 2.5 = 3 tokens, "ab", "cde" and "fgh".
    """
    count = max(1, round(len(text) / chars_per_token))
    ends = [round(number * chars_per_token) for number in range(count)] + [len(text)]
    return [ids.setdefault(text[start:end], len(ids)) for start, end in pairwise(ends)]


def _texts(group: PreferenceGroup) -> list[str]:
    def characters(part: Any) -> str:
        return part if isinstance(part, str) else "".join(message.get("content") or "" for message in part)

    return [characters(group.prompt) + characters(response) for response in group.responses]


def _fit(texts: list[list[int]], config: DataConfig) -> list[list[int]]:
    """The length policy of training, but a text that would stop training is dropped."""
    longest = max(map(len, texts))
    if longest > config.max_length and (config.filter_overlong_prompts or config.truncation == "error"):
        raise BadRow(f"longer than data.max_length={config.max_length}")
    return [text[-config.max_length :] if config.truncation == "left" else text[: config.max_length] for text in texts]


def _concatenate(chunks: list[TokenChunk]) -> TokenData:
    arrays = {name: np.concatenate([chunk.arrays[name] for chunk in chunks]) for name in ARRAYS}
    files = [name for chunk in chunks for name in chunk.files]
    first_file = np.cumsum([0, *(len(chunk.files) for chunk in chunks)])
    arrays["file"] = np.concatenate([chunk.arrays["file"] + first_file[i] for i, chunk in enumerate(chunks)])
    return TokenData(with_starts(arrays), files=files, sources=[], style="text")


def tokenizer_in(model: str) -> str | None:
    """The model's folder, or that of its configuration file, if it holds a fast tokenizer, else None."""
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    return str(folder) if (folder / "tokenizer.json").is_file() else None
