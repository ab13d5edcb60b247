"""Token arrays: all groups of a dataset in flat arrays, with the same layout in memory and in files.

Example, groups with prefixes of 2 and 0 tokens and tails of (2, 1) and (3,):

    tokens         a b c d e f g h        prefix 2, tails 2 and 1, then prefix 0, tail 3
    prefix         2 0                    tail            2 1 3
    token_start    0 5 8                  response_start  0 2 3

Files are memory-mapped (`store.py`); nothing here copies a whole array.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rm_gallery.data.token_cache.counts import count_pairs, count_targets, count_values
from rm_gallery.data.token_cache.fingerprint import Fingerprint
from rm_gallery.data.tokenization.token_group import Origin, Span, TokenGroup, is_ranking, largest_tie, ranks_of
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, InputStyle, Rating

# N groups, R responses, C comparisons, T tokens; each count is over the whole data set or chunk

# Arrays of token data and their types, by what they have one item for.
PER_GROUP = {
    "prefix": np.int32, "num_responses": np.int32, "num_comparisons": np.int32, "group_tokens": np.int32,
    "longest_text": np.int32, "file": np.int32, "row": np.int64, "source": np.int32, "prompt_hash": np.uint64,
    "metadata_bytes": np.int32, "checksum": np.uint32, "num_attributes": np.int32, "num_spans": np.int32,
}  # fmt: skip
PER_RESPONSE = {"tail": np.int32, "score": np.float32, "rank": np.float32, "rating_weight": np.float32}
PER_COMPARISON = {
    "better": np.int32, "worse": np.int32, "weight": np.float32, "margin": np.float32, "p_better": np.float32,
    "tied": np.uint8,
}  # fmt: skip
PER_SPAN = {"span_response": np.int32, "span_first": np.int32, "span_last": np.int32}
ARRAYS = {
    **PER_GROUP,
    **PER_RESPONSE,
    **PER_COMPARISON,
    **PER_SPAN,
    "attributes": np.float32,
    "tokens": np.int32,
    "metadata": np.uint8,
}
# [N + 1] int64: the first item of each group in other arrays -> the array of item counts per group.
STARTS = {
    "token_start": "group_tokens", "response_start": "num_responses", "comparison_start": "num_comparisons",
    "metadata_start": "metadata_bytes", "attribute_start": "num_attributes",
    "span_start": "num_spans",
}  # fmt: skip


@dataclass
class TokenChunk:
    """Some groups as the arrays of `ARRAYS`; `file` and `source` are indices into the lists of this chunk."""

    arrays: dict[str, np.ndarray]
    files: list[str]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.arrays["prefix"])


def make_chunk(groups: Iterable[tuple[TokenGroup, Origin]]) -> TokenChunk:
    """Groups with their origins as arrays."""
    files: dict[str, int] = {}
    sources: dict[str, int] = {}
    per_group: list[tuple[int, ...]] = []
    tails: list[int] = []
    ratings: list[tuple[float, ...]] = []
    attributes: list[float] = []
    comparisons: list[tuple[float, ...]] = []
    spans: list[tuple[int, ...]] = []
    tokens: list[np.ndarray] = []
    metadata: list[bytes] = []
    for group, origin in groups:
        lengths = [len(tail) for tail in group.tails]
        rated = ratings_of(group)
        values = [value for each in rated for value in each.attributes]
        note = json.dumps(dict(origin.metadata), default=str).encode() if origin.metadata else b""
        per_group.append(
            (
                len(group.prefix), len(lengths), len(group.comparisons), len(group.prefix) + sum(lengths),
                len(group.prefix) + max(lengths), files.setdefault(origin.file, len(files)), origin.row,
                sources.setdefault(origin.source, len(sources)), origin.prompt_hash, len(note), len(values),
                len(group.spans),
            )
        )  # fmt: skip
        tails += lengths
        ratings += [(_or_nan(each.score), _or_nan(each.rank), each.weight) for each in rated]
        attributes += values
        comparisons += [
            (each.better, each.worse, each.weight, _or_nan(each.margin), _or_nan(each.p_better), each.tied)
            for each in group.comparisons
        ]
        spans += [(each.response, each.first, each.last) for each in group.spans]
        tokens += [group.prefix, *group.tails]
        metadata.append(note)
    arrays = {
        **_columns({name: kind for name, kind in PER_GROUP.items() if name != "checksum"}, per_group),
        **_columns(PER_COMPARISON, comparisons),
        **_columns(PER_SPAN, spans),
        "tail": np.array(tails, np.int32),
        **_columns({name: kind for name, kind in PER_RESPONSE.items() if name != "tail"}, ratings),
        "attributes": np.array(attributes, np.float32),
        "tokens": np.concatenate(tokens).astype(np.int32, copy=False) if tokens else np.zeros(0, np.int32),
        "metadata": np.frombuffer(b"".join(metadata), np.uint8),
    }
    arrays["checksum"] = np.zeros(len(per_group), np.uint32)
    starts = with_starts(arrays)
    for index in range(len(per_group)):
        arrays["checksum"][index] = _checksum(starts, index)
    return TokenChunk(arrays, list(files), list(sources))


def ratings_of(group: TokenGroup) -> list[Rating]:
    """One rating per response, without values where the group has none."""
    by_response = {each.response: each for each in group.ratings}
    count = max((len(each.attributes) for each in group.ratings), default=0)
    return [
        by_response.get(response) or Rating(response, attributes=(float("nan"),) * count)
        for response in range(len(group.tails))
    ]


def _checksum(arrays: Mapping[str, np.ndarray], index: int) -> int:
    """CRC-32 of what the model sees of a group."""

    def span(name: str) -> slice:
        return slice(int(arrays[name][index]), int(arrays[name][index + 1]))

    found = zlib.crc32(arrays["prefix"][index : index + 1].data)
    found = zlib.crc32(arrays["tokens"][span("token_start")].data, found)
    for name in PER_RESPONSE:
        found = zlib.crc32(arrays[name][span("response_start")].data, found)
    found = zlib.crc32(arrays["attributes"][span("attribute_start")].data, found)
    for name in PER_COMPARISON:
        found = zlib.crc32(arrays[name][span("comparison_start")].data, found)
    for name in PER_SPAN:
        found = zlib.crc32(arrays[name][span("span_start")].data, found)
    return found


def _columns(types: Mapping[str, Any], rows: list[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    columns = list(zip(*rows, strict=True)) or [()] * len(types)
    return {name: np.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def with_starts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays together with those of `STARTS`."""
    starts = {
        name: np.concatenate([[0], np.cumsum(arrays[counted], dtype=np.int64)]) for name, counted in STARTS.items()
    }
    return {**arrays, **starts}


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """Sizes of groups, which planning needs; each [N] int32 or int64, possibly memory-mapped."""

    tokens: np.ndarray
    """Tokens of each group, with the common prefix counted once."""
    longest_text: np.ndarray
    """Tokens of its longest whole text (prefix and response)."""
    num_responses: np.ndarray
    num_comparisons: np.ndarray
    """Comparisons of each group; its responses in data that are ratings or conversations (`TokenData.unit`)."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, int, int, int]]) -> GroupSizes:
        """Sizes of groups, each a tuple of the four fields, as `TokenGroup.sizes` gives it; int64."""
        return cls(*np.array(list(rows), np.int64).reshape(-1, 4).T)

    def of(self, groups: np.ndarray) -> GroupSizes:
        """The sizes of these groups, in this order."""
        return GroupSizes(
            self.tokens[groups], self.longest_text[groups], self.num_responses[groups], self.num_comparisons[groups]
        )


class TokenData:
    """All groups of a dataset; `data[i]` is the i-th `TokenGroup`."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], *, files: Sequence[str], sources: Sequence[str], style: InputStyle,
        has_text_prompts: bool = False, fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        """arrays: those of `ARRAYS` and `STARTS`. fingerprint: if known; computing it reads all tokens."""
        self._arrays = arrays
        self.files, self.sources = files, sources
        """Names, which `file` and `source` of a group index."""
        self.style = style
        self.has_text_prompts = has_text_prompts
        """Style `text`: whether responses were preceded directly by a prompt."""
        self._fingerprint = fingerprint
        self.is_rated = not len(arrays["better"]) and bool(len(arrays["attributes"]))
        """Whether the groups are ratings of responses by attributes, instead of comparisons between responses."""
        has_spans = bool(len(arrays["span_first"]))
        self.is_conversations = not len(arrays["better"]) and has_spans
        """Whether the groups are texts of which a language model predicts some tokens (`TokenGroup.spans`)."""
        self.unit = "rated responses" if self.is_rated else "conversations" if self.is_conversations else "pairs"
        """What the items of the data are, which `data.train_batch_size` counts."""
        self.sizes = GroupSizes(
            tokens=arrays["group_tokens"],
            longest_text=arrays["longest_text"],
            num_responses=arrays["num_responses"],
            num_comparisons=arrays["num_comparisons" if self.unit == "pairs" else "num_responses"],
        )
        self.target_counts = count_targets(arrays, of_conversations=self.is_conversations) if has_spans else None
        """[N] int: target tokens of the language-model loss of each group; None without any."""
        self.loss_counts = count_values(arrays) if self.is_rated else self.sizes.num_comparisons
        """[N] int: what each group adds to the divisor of the loss sum: comparisons, known attributes, or tokens."""
        if self.is_conversations:
            assert self.target_counts is not None
            self.loss_counts = self.target_counts
        self.is_ranked = False
        """Whether a group is one item, a ranking of its responses that is never cut; see `as_rankings`."""

    def known_attributes(self) -> np.ndarray:
        """float32: every attribute of every response that the data have."""
        values = self._arrays["attributes"]
        return np.asarray(values[~np.isnan(values)])

    def by_pairs(self) -> TokenData:
        """The same ratings of one attribute, counted as pairs of responses to a prompt whose numbers differ.

        Not counted are pairs of responses in different groups.
        """
        found = copy(self)
        found.loss_counts = count_pairs(self._arrays)
        found.sizes = replace(self.sizes, num_comparisons=found.loss_counts)
        return found

    def as_rankings(self, max_tied: int | None = None) -> None:
        """Count each group as one ranking. Raises UserError for comparisons that are not those of a ranking.

        max_tied: most tied responses above others; None for any number.
        """
        for index in np.flatnonzero(self.sizes.num_comparisons > 1).tolist():
            group = self[index]
            if not is_ranking(group):
                raise UserError(
                    f"{self.where(index)}: not a ranking: some two responses are neither compared nor tied, are "
                    "compared in a circle, or have different weights; set objective.name=bradley_terry"
                )
            if max_tied is not None and (count := largest_tie(group.comparisons)) > max_tied:
                raise UserError(
                    f"{self.where(index)}: {count} tied responses are above others, and the exact likelihood takes at "
                    f"most {max_tied}; set objective.ties=auto"
                )
        self.is_ranked = True
        self.loss_counts = (self.sizes.num_comparisons > 0).astype(np.int64)

    @classmethod
    def from_groups(
        cls, groups: Iterable[tuple[TokenGroup, Origin]], style: InputStyle = "text", *, has_text_prompts: bool = False
    ) -> TokenData:
        """Token data in memory."""
        chunk = make_chunk(groups)
        return cls(
            with_starts(chunk.arrays),
            files=chunk.files,
            sources=chunk.sources,
            style=style,
            has_text_prompts=has_text_prompts,
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> TokenGroup:
        """Raises UserError if a mapped file no longer has what was written."""
        arrays = self._arrays
        if _checksum(arrays, index) != int(arrays["checksum"][index]):
            raise UserError(
                f"group {index} of the token cache changed during this run (a disk fault, or a program that wrote to "
                "data.cache_dir); start the same command again: it tokenizes the data again"
            )
        start, prefix = int(arrays["token_start"][index]), int(arrays["prefix"][index])
        tails = arrays["tail"][arrays["response_start"][index] : arrays["response_start"][index + 1]]
        tokens = np.asarray(arrays["tokens"][start : int(arrays["token_start"][index + 1])])
        bounds = prefix + np.cumsum(np.concatenate([[0], tails]))
        parts = [tokens[first:last] for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        comparisons = self._comparisons(index)
        if self.is_ranked:
            weight = comparisons[0].weight if comparisons else 1.0
            ranks = ranks_of(comparisons)
            ratings = [Rating(response, rank=ranks[response], weight=weight) for response in sorted(ranks)]
            return TokenGroup(tokens[:prefix], parts, comparisons, ratings, self._spans(index, comparisons))
        return TokenGroup(tokens[:prefix], parts, comparisons, self._ratings(index), self._spans(index, comparisons))

    def _spans(self, index: int, comparisons: Sequence[Comparison]) -> list[Span]:
        """The spans of a conversation; of comparisons those of the preferred response of each, once per comparison."""
        first, last = (int(self._arrays["span_start"][place]) for place in (index, index + 1))
        columns = [self._arrays[name][first:last].tolist() for name in PER_SPAN]
        spans = [Span(*each) for each in zip(*columns, strict=True)]
        if not spans:
            return []
        if self.is_conversations:
            weights = self._arrays["rating_weight"][int(self._arrays["response_start"][index]) :]
            return [replace(span, weight=float(weights[span.response])) for span in spans]
        return [
            replace(span, comparison=number)
            for number, each in enumerate(comparisons)
            for span in spans
            if span.response == each.better
        ]

    def _ratings(self, index: int) -> list[Rating]:
        if not self.is_rated:
            return []
        first, last = (int(self._arrays["response_start"][place]) for place in (index, index + 1))
        start, end = (int(self._arrays["attribute_start"][place]) for place in (index, index + 1))
        values = self._arrays["attributes"][start:end].reshape(last - first, -1).tolist()
        weights = self._arrays["rating_weight"][first:last].tolist()
        pairs = zip(values, weights, strict=True)
        return [
            Rating(response, attributes=tuple(each), weight=weight) for response, (each, weight) in enumerate(pairs)
        ]

    def _comparisons(self, index: int) -> list[Comparison]:
        first, last = (int(self._arrays["comparison_start"][place]) for place in (index, index + 1))
        columns = [self._arrays[name][first:last].tolist() for name in PER_COMPARISON]
        return [
            Comparison(better, worse, weight, _or_none(margin), _or_none(p_better), bool(tied))
            for better, worse, weight, margin, p_better, tied in zip(*columns, strict=True)
        ]

    @property
    def tokens(self) -> np.ndarray:
        """[T] int32: for every group the common prefix, then the tails."""
        return self._arrays["tokens"]

    @property
    def num_tokens(self) -> int:
        """Tokens of all groups, with common prefixes counted once."""
        return len(self.tokens)

    @property
    def num_comparisons(self) -> int:
        return len(self._arrays["better" if self.unit == "pairs" else "tail"])

    @property
    def num_tied(self) -> int:
        """Comparisons that are ties."""
        return int(np.count_nonzero(self._arrays["tied"]))

    @property
    def tail_lengths(self) -> np.ndarray:
        """[R] int32: tokens of each response after the common prefix, group by group."""
        return self._arrays["tail"]

    @property
    def prefix_lengths(self) -> np.ndarray:
        """[N] int32: tokens of the common prefix of each group."""
        return self._arrays["prefix"]

    @property
    def prompt_hashes(self) -> np.ndarray:
        """[N] uint64: equal for groups of the same prompt."""
        return self._arrays["prompt_hash"]

    def pair_lengths(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(group, prefix tokens, tail tokens of better, tail tokens of worse) of each comparison of these groups.

        Each is [C] int64. Of ratings and conversations, the response is the better one, and the other has no tokens.
        """
        arrays = self._arrays
        if self.unit != "pairs":
            counts = self.sizes.num_responses[groups].astype(np.int64)
            owner = np.repeat(groups, counts)
            place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            tails = arrays["tail"][arrays["response_start"][owner] + place].astype(np.int64)
            return owner, arrays["prefix"][owner].astype(np.int64), tails, np.zeros_like(tails)
        counts = self.sizes.num_comparisons[groups].astype(np.int64)
        owner = np.repeat(groups, counts)
        ends = np.cumsum(counts)
        index = np.arange(len(owner)) + np.repeat(arrays["comparison_start"][groups] - (ends - counts), counts)
        first = arrays["response_start"][owner]
        better, worse = (arrays["tail"][first + arrays[side][index]].astype(np.int64) for side in ("better", "worse"))
        return owner, arrays["prefix"][owner].astype(np.int64), better, worse

    @property
    def source_numbers(self) -> np.ndarray:
        """[N] int32: indices into `sources`."""
        return self._arrays["source"]

    @property
    def file_numbers(self) -> np.ndarray:
        """[N] int32: indices into `files`."""
        return self._arrays["file"]

    def where(self, index: int) -> str:
        """`file:row` of a group."""
        return f"{self.files[int(self._arrays['file'][index])]}:{int(self._arrays['row'][index])}"

    def metadata(self, index: int) -> dict[str, Any]:
        """Extra columns of the row of a group."""
        first, last = (int(self._arrays["metadata_start"][place]) for place in (index, index + 1))
        return json.loads(self._arrays["metadata"][first:last].tobytes()) if last > first else {}

    def labels(self) -> list[str]:
        """Labels that occur anywhere, by the names of their arrays."""
        if self.is_conversations:
            return []
        names = ("score", "rank") if self.is_rated else ("margin", "p_better", "score", "rank")
        return [name for name in names if not np.isnan(self._arrays[name]).all()]

    def without(self, label: str, *, may_be_negative: bool = True) -> tuple[int, str]:
        """(how many comparisons lack this label, `file:row` of the first). label: `margin` or `p_better`."""
        values = self._arrays[label]
        missing = np.flatnonzero(np.isnan(values) if may_be_negative else ~(values >= 0))
        if not len(missing):
            return 0, ""
        return len(missing), self.where(int(np.searchsorted(self._arrays["comparison_start"], missing[0], "right")) - 1)

    def all_zero(self, label: str) -> bool:
        """Whether every value of a label is 0. label: `margin` of comparisons, or `weight` of the data's units."""
        name = "rating_weight" if label == "weight" and self.unit != "pairs" else label
        return not self._arrays[name].any()

    def fingerprint(self) -> str:
        """Hash of everything the model sees: tokens, bounds of responses, comparisons."""
        if self._fingerprint is None:
            self._fingerprint = Fingerprint().add(self._arrays).hexdigest()
        return self._fingerprint


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
