"""Token data: groups as token ids with the common prefix split off, all of a data set in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rm_gallery.data.dropped import BadRow
from rm_gallery.schema import Comparison, InputStyle

# N groups, R responses, C comparisons; each count is over the whole data set


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One group as tokens: the common prefix once, then each response's own tokens."""

    prefix: np.ndarray
    """[P] int32, P >= 0."""
    tails: list[np.ndarray]
    """K arrays int32, each with at least one token."""
    comparisons: Sequence[Comparison]


def split_prefix(texts: Sequence[Sequence[int]], comparisons: Sequence[Comparison]) -> TokenGroup:
    """Split the longest common prefix off, leaving every response at least one token of its own.

    Example: [1 2 3 4] and [1 2 3] give prefix [1 2], tails [3 4] and [3].
    Raises BadRow for a text without a token, which no reward can be read from.
    """
    arrays = [np.asarray(ids, np.int32) for ids in texts]
    size = min(len(array) for array in arrays) - 1
    if size < 0:
        raise BadRow("text without a token")
    first = arrays[0][:size]
    for array in arrays[1:]:
        differs = np.flatnonzero(array[:size] != first[:size])
        size = int(differs[0]) if len(differs) else size
    if len(arrays) == 1:
        size = 0  # nothing to share: the whole text is the response's own
    return TokenGroup(arrays[0][:size], [array[size:] for array in arrays], comparisons)


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """What planning needs to know of the groups; each is [N] int64."""

    tokens: np.ndarray
    """Tokens of the group, the common prefix counted once."""
    longest_text: np.ndarray
    """Tokens of its longest whole text, prefix and response."""
    num_responses: np.ndarray
    num_comparisons: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class TokenData:
    """All groups of a data set as flat arrays; `data[i]` is the i-th `TokenGroup`."""

    def __init__(self, groups: Iterable[tuple[TokenGroup, str]], style: InputStyle) -> None:
        parts: list[np.ndarray] = []
        prefix_lengths, tail_lengths, counts, self._comparisons, self.where = [], [], [], [], []
        for group, where in groups:
            parts += [group.prefix, *group.tails]
            prefix_lengths.append(len(group.prefix))
            tail_lengths += [len(tail) for tail in group.tails]
            counts.append(len(group.tails))
            self._comparisons.append(tuple(group.comparisons))
            self.where.append(where)
        self.style = style
        self.has_text_prompts = False
        """Style `text`: whether a prompt stood before the responses, joined directly."""
        self.tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        self._prefix = np.array(prefix_lengths, np.int64)
        self._tails = np.array(tail_lengths, np.int64)
        self._tail_start = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)
        tail_sums = np.add.reduceat(self._tails, self._tail_start[:-1]) if counts else np.zeros(0, np.int64)
        lengths = self._prefix + tail_sums
        self._start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        longest = np.maximum.reduceat(self._tails, self._tail_start[:-1]) if counts else np.zeros(0, np.int64)
        self.sizes = GroupSizes(
            tokens=lengths,
            longest_text=self._prefix + longest,
            num_responses=np.array(counts, np.int64),
            num_comparisons=np.array([len(each) for each in self._comparisons], np.int64),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> TokenGroup:
        start = int(self._start[index])
        cut = start + int(self._prefix[index])
        lengths = self._tails[self._tail_start[index] : self._tail_start[index + 1]]
        ends = cut + np.cumsum(lengths)
        tails = [self.tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        return TokenGroup(self.tokens[start:cut], tails, self._comparisons[index])

    def fingerprint(self) -> str:
        """Hash of everything the model sees: tokens, where responses begin and end, comparisons."""
        digest = hashlib.sha256()
        for array in (self.tokens, self._prefix, self._tails, self._tail_start):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(repr(self._comparisons).encode())
        return digest.hexdigest()[:16]
