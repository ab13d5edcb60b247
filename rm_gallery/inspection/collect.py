"""Collecting: one pass over the rows of a split, from which every figure of the report is computed.

Rows become tokens as in training, by `RowProcessor`. The pass also keeps numbers of each text (hashes, characters,
flags), a sample of the pairs for the baselines and a sample of the groups to display.
"""

from __future__ import annotations

import logging
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from rm_gallery.data.config import DataConfig, Side
from rm_gallery.data.formats import Task, iter_tasks
from rm_gallery.data.sources import DataFile, entries_of
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.row_processor import RowProcessor, Work
from rm_gallery.data.token_cache.store import Facts, StoreWriter, open_store
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import Dropped, UserError
from rm_gallery.inspection.baselines import MAX_PAIRS, SampledPair, sampled_pair
from rm_gallery.inspection.findings import flags_of
from rm_gallery.inspection.near_duplicates import Signatures
from rm_gallery.inspection.texts import (
    ExampleText,
    InspectionEncoder,
    TextStore,
    TokenEncoder,
    WordEncoder,
    hash_text,
    text_of_row,
    texts_of,
    words_of,
)
from rm_gallery.sampling import Reservoir
from rm_gallery.schema import PreferenceGroup

log = logging.getLogger(__name__)

# N groups that training uses, R their responses, C their pairs (comparisons), E all groups that could be tokenized

_ROWS_BETWEEN_LOGS = 100_000
_NEAR_CHARS = 3000  # more than near_duplicates.MAX_WORDS words of most texts


@dataclass(frozen=True)
class Split:
    """Training or validation data after one pass. The arrays take about 150 bytes a pair."""

    name: str
    """`training` or `validation`."""
    files: tuple[DataFile, ...]
    short_names: Mapping[str, str]
    """File name -> the name that examples use, without folders where that is unambiguous."""
    data: TokenData
    """The groups as tokens (or words), in files that are mapped into memory."""
    dropped: Dropped
    dropped_texts: Mapping[str, ExampleText]
    """Reason -> the first row that is dropped for it."""
    texts: TextStore
    encoder: InspectionEncoder
    styles: dict[str, int]
    """Number of groups of each input style."""
    response: np.ndarray
    """[R] uint64: hash of the text."""
    chars: np.ndarray
    """[R] int64: characters of the text."""
    signatures: np.ndarray
    """[N, 32] uint16, see near_duplicates.py."""
    comparable: np.ndarray
    """[N] bool: long enough for near duplicates."""
    first_response: np.ndarray
    """[N + 1] int64: where the responses of each group begin."""
    group: np.ndarray
    """[C] int64: group of each pair."""
    better: np.ndarray
    """[C] int64: index of the response in [R]."""
    worse: np.ndarray
    """[C] int64."""
    flags: np.ndarray
    """[C] int64, see findings.flags_of."""
    longest: np.ndarray
    """[E] int64: units of the longest text of each group, before the length policy."""
    encoded: np.ndarray
    """[N] int64: index of each group in [E]."""
    pairs: Reservoir[SampledPair]
    samples: list[tuple[int, PreferenceGroup]]
    """Groups to display, with their index, in the order of the data."""

    @property
    def prompt(self) -> np.ndarray:
        """[N] uint64: hash of the prompt."""
        return self.data.prompt_hashes

    @property
    def num_groups(self) -> int:
        return len(self.data)

    @property
    def num_pairs(self) -> int:
        return len(self.group)

    def where(self, group: int) -> str:
        """`file:row` of a group, with the short name of the file."""
        return short_place(self.data.where(group), self.short_names)

    def where_pair(self, pair: int) -> str:
        """`file:row` of a pair."""
        return self.where(int(self.group[pair]))

    def text(self, *groups: int, where: str = "") -> ExampleText:
        """The text of a group, or of several after each other; `where` replaces the place of the first."""
        return ExampleText(
            where or self.where(groups[0]), tuple(part for group in groups for part in self.texts.get(group))
        )

    def text_of_pair(self, pair: int) -> ExampleText:
        """The text of the group of a pair."""
        return self.text(int(self.group[pair]))

    def prompt_share(self) -> float:
        """Share of groups that have the most frequent prompt."""
        return float(np.unique(self.prompt, return_counts=True)[1].max() / self.num_groups)


def short_place(place: str, short_names: Mapping[str, str]) -> str:
    """`file:row` with the short name of the file."""
    file, colon, row = place.rpartition(":")
    return f"{short_names.get(file, file)}{colon}{row}"


def collect(
    name: str,
    side: Side,
    files: list[DataFile],
    config: DataConfig,
    tokenizer: Any | None,
    *,
    short_names: Mapping[str, str],
    num_samples: int,
    seed: int,
) -> Split:
    """Read a split once.

    tokenizer: None to count words instead of tokens.
    Bad rows are dropped and counted whatever `data.bad_rows` is. Raises UserError if no row is usable.
    """
    config = replace(config, bad_rows="drop")
    encoder = WordEncoder if tokenizer is None else TokenEncoder
    dropped = Dropped()
    dropped_texts: dict[str, ExampleText] = {}
    num_rows = held_out = logged = 0
    with tempfile.TemporaryDirectory(prefix="rm-gallery-") as folder:
        observer = _Observer(num_samples, seed, TextStore(Path(folder) / "texts"))
        processor = RowProcessor(Work(config, tokenizer, side.share), encoder_type=encoder, observe=observer.add)
        observer.encoder = cast(InspectionEncoder, processor.encoder)
        with StoreWriter(Path(folder) / "tokens") as writer:
            for task in iter_tasks(files, entries_of(config, side.key), config, side.key, set()):
                done = processor.process(task.chunk.rows(), processor.readers.get(task.format_name), task.source)
                writer.append(done.chunk)
                dropped_texts.update(_dropped_texts(task, done.dropped, dropped, short_names))
                dropped.merge(done.dropped)
                num_rows, held_out = num_rows + done.num_rows, held_out + done.held_out
                if num_rows - logged >= _ROWS_BETWEEN_LOGS:
                    logged = num_rows
                    log.info("%s: %s rows read", name, f"{num_rows:,}")
            writer.finish(Facts("text", False, [], num_rows, held_out), dropped)
        observer.texts.finish()
        store = open_store(Path(folder) / "tokens")  # the mapped files stay readable after the folder is deleted
    assert store is not None, "written above"
    if not len(store.data):
        raise UserError(
            f"{side.key}: none of {num_rows - held_out} rows can be used: {dropped.describe()}; {dropped.remedy}"
        )
    examples = {reason: short_place(place, short_names) for reason, place in dropped.examples.items()}
    return observer.split(name, tuple(files), short_names, store.data, Dropped(dropped.counts, examples), dropped_texts)


def _dropped_texts(
    task: Task, found: Dropped, known: Dropped, short_names: Mapping[str, str]
) -> Iterator[tuple[str, ExampleText]]:
    """Reason and text of the rows of a chunk that are the first to be dropped for a reason."""
    reasons = {place: reason for reason, place in found.examples.items() if reason not in known.counts}
    for row in task.chunk.rows() if reasons else ():
        if row.where in reasons:
            yield reasons[row.where], replace(text_of_row(row), where=short_place(row.where, short_names))


class _Observer:
    """Records the numbers of each group during the pass."""

    encoder: InspectionEncoder

    def __init__(self, num_samples: int, seed: int, texts: TextStore) -> None:
        self._response = array("Q")
        self._chars, self._encoded, self._flags = array("q"), array("q"), array("q")
        self._first, self._group, self._better, self._worse = array("q", [0]), array("q"), array("q"), array("q")
        self._styles: Counter[str] = Counter()
        self._signatures = Signatures()
        self.texts = texts
        self._pairs: Reservoir[SampledPair] = Reservoir(MAX_PAIRS, seed=seed)
        self._samples: Reservoir[tuple[int, PreferenceGroup]] = Reservoir(num_samples, seed=seed + 1)

    def add(self, group: PreferenceGroup, tokens: TokenGroup, prompt: int) -> None:
        """A group that training uses."""
        number, first = len(self._encoded), self._first[-1]
        texts = texts_of(group)
        self.texts.add(group, texts)
        self._encoded.append(len(self.encoder.longest) - 1)
        self._styles[group.style] += 1
        for text in texts.responses:
            self._response.append(hash_text(text))
            self._chars.append(len(text))
        self._first.append(first + len(texts.responses))
        for comparison in tokens.comparisons:
            self._group.append(number)
            self._better.append(first + comparison.better)
            self._worse.append(first + comparison.worse)
            self._flags.append(flags_of(texts, comparison))
            if (place := self._pairs.wants()) is not None:
                better, worse = texts.responses[comparison.better], texts.responses[comparison.worse]
                self._pairs.put(place, sampled_pair(prompt, better, worse))
        self._signatures.add(
            words_of(texts.prompt[-2 * _NEAR_CHARS :]), [words_of(text[:_NEAR_CHARS]) for text in texts.responses]
        )
        if (place := self._samples.wants()) is not None:
            self._samples.put(place, (number, group))

    def split(
        self,
        name: str,
        files: tuple[DataFile, ...],
        short_names: Mapping[str, str],
        data: TokenData,
        dropped: Dropped,
        dropped_texts: Mapping[str, ExampleText],
    ) -> Split:
        signatures, comparable = self._signatures.finish()
        return Split(
            name=name,
            files=files,
            short_names=short_names,
            data=data,
            dropped=dropped,
            dropped_texts=dropped_texts,
            texts=self.texts,
            encoder=self.encoder,
            styles=dict(self._styles),
            response=_numbers(self._response, np.uint64),
            chars=_numbers(self._chars),
            signatures=signatures,
            comparable=comparable,
            first_response=_numbers(self._first),
            group=_numbers(self._group),
            better=_numbers(self._better),
            worse=_numbers(self._worse),
            flags=_numbers(self._flags),
            longest=_numbers(self.encoder.longest),
            encoded=_numbers(self._encoded),
            pairs=self._pairs,
            samples=self._samples.in_order(),
        )


def _numbers(values: array[int], dtype: type = np.int64) -> np.ndarray:
    """The same memory as a numpy array."""
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)
