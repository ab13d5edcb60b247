"""The visibility rule of attention, and the layout of a packed batch: its groups in buckets of similar length.

Layouts are computed on the host from lengths that the host knows, and copied to the device asynchronously.

Example: group 0 has the prefix [a b] and the responses [c d] and [e]; group 1 has the single response [f].

    token      a   b   c   d   e   f
    group      0   0   0   0   0   1
    response  -1  -1   0   0   1   2      -1: common prefix
    position   0   1   2   3   2   0

Token e sees a, b and e: not c and d, which belong to another response. With _MIN_FILL = 0.75 the groups (5 tokens and
1 token) are in different buckets; groups of 8, 7 and 6 tokens share one bucket, padded to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Part = TypeVar("Part")

# T tokens, R responses, B groups of a bucket, Q queries and L keys of its longest group

_MAX_SPLIT_CELLS = 0.5  # share of the mask cells of whole groups up to which splitting by response is less work
_MIN_FILL = 0.75  # length of the shortest group of a bucket, as a share of the longest


def visible(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """The visibility rule. q: [..., Q, 3] and k: [..., K, 3] are (group, response, position). Returns bool [..., Q, K].

    window: sliding window of the layer, in positions; None for full attention.
    """
    group_q, response_q, position_q = q.unsqueeze(-2).unbind(-1)  # [..., Q, 1]
    group_k, response_k, position_k = k.unsqueeze(-3).unbind(-1)  # [..., 1, K]
    seen = (group_q == group_k) & (position_k <= position_q) & ((response_k == -1) | (response_k == response_q))
    if window is not None:
        seen = seen & (position_q - position_k < window)
    return seen


@dataclass(frozen=True)
class Bucket:
    """Groups of similar length, padded to the longest."""

    queries: Tensor
    """[B, Q] int64 rows of the query matrix; padding repeats the first row of the group."""
    query_labels: Tensor
    """[B, Q, 3] (group, response, position) of the queries."""
    index: Tensor
    """[B, L] int64 tokens whose keys and values the queries may see; padding repeats the first token of the group."""
    labels: Tensor
    """[B, L, 3] (group, response, position) of the keys; padding has group -2, which no query sees."""


@dataclass(frozen=True)
class Queries:
    """Query tokens of a batch and the keys of their groups, in buckets."""

    buckets: list[Bucket]
    restore: Tensor
    """[number of queries] index of each query in the concatenated rows of the buckets."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """(bucket, window) -> bool [B, 1, Q, L], computed on first use."""
    biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """(bucket, window, dtype) -> the mask as an additive bias: 0, or minus infinity where a query sees no key."""

    def mask(self, bucket: int, window: int | None) -> Tensor:
        key = (bucket, window)
        if key not in self.masks:
            found = self.buckets[bucket]
            self.masks[key] = visible(found.query_labels, found.labels, window).unsqueeze(1)
        return self.masks[key]

    def bias(self, bucket: int, window: int | None, dtype: torch.dtype) -> Tensor:
        key = (bucket, window, dtype)
        if key not in self.biases:
            mask = self.mask(bucket, window)
            self.biases[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, float("-inf")
            )
        return self.biases[key]


class PackLayout:
    """Layout of one batch, shared by all layers. Its parts are computed on first use."""

    def __init__(
        self, group_lengths: Sequence[int], tail_lengths: Sequence[Sequence[int]], device: torch.device, kernel: str
    ) -> None:
        """group_lengths, tail_lengths: see PackedBatch. kernel: the setting `model.attention`."""
        self.device, self.kernel = device, kernel
        self._made: dict[Hashable, Any] = {}
        self.lengths = np.array(group_lengths, np.int64)  # [G]
        self.starts = np.cumsum(self.lengths) - self.lengths  # [G]
        self.num_tails = np.array([len(tails) for tails in tail_lengths], np.int64)  # [G]
        self.tails = np.array([tail for tails in tail_lengths for tail in tails], np.int64)  # [R]
        tail_groups = np.repeat(np.arange(len(self.lengths)), self.num_tails)  # [R]
        self.prefixes = self.lengths - np.bincount(tail_groups, self.tails, len(self.lengths)).astype(np.int64)  # [G]
        before = np.cumsum(self.tails) - self.tails  # [R] tokens in the tails before each one
        self.tail_starts = before + np.cumsum(self.prefixes)[tail_groups]  # [R] in the batch
        self.tail_groups = tail_groups
        self.reward_index = self.put(self.tail_starts + self.tails - 1)
        """[R] the last token of each response."""

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest text: a prefix with its longest response."""
        return int((self.prefixes[self.tail_groups] + self.tails).max(initial=0))

    @cached_property
    def host_labels(self) -> np.ndarray:
        """[T, 3] (group, response, position) of each token; response -1 in a common prefix."""
        labels = np.empty((int(self.lengths.sum()), 3), np.int64)
        labels[:, 0] = np.repeat(np.arange(len(self.lengths)), self.lengths)
        labels[:, 1] = -1
        places = np.arange(len(labels))
        labels[:, 2] = places - self.starts[labels[:, 0]]
        in_tails = ranges(self.tail_starts, self.tails)
        responses = np.repeat(np.arange(len(self.tails)), self.tails)
        labels[in_tails, 1] = responses
        prefixes = self.prefixes[self.tail_groups]
        labels[in_tails, 2] = in_tails - (self.tail_starts - prefixes)[responses]
        return labels

    @cached_property
    def labels(self) -> Tensor:
        """[T, 3] on the device."""
        return self.put(self.host_labels)

    @cached_property
    def _order(self) -> list[np.ndarray]:
        """Groups of each bucket, longest first."""
        longest_first = np.argsort(-self.lengths, kind="stable")
        found = []
        while len(longest_first):
            lengths = self.lengths[longest_first]
            count = int((lengths >= _MIN_FILL * lengths[0]).sum())
            found.append(longest_first[:count])
            longest_first = longest_first[count:]
        return found

    @cached_property
    def all_tokens(self) -> Queries:
        """Queries are all tokens; keys are those of the whole group."""
        buckets = []
        for groups in self._order:
            index, inside = _rows(groups, self.starts, self.lengths)
            labels = self.host_labels[index]  # [B, L, 3]
            seen = np.where(inside[:, :, None], labels, -2)
            on_device = self.put(index)
            buckets.append(Bucket(on_device, self.put(labels), on_device, self.put(seen)))
        return Queries(buckets, self._restore(self.starts, self.lengths))

    @cached_property
    def by_response(self) -> Queries | None:
        """Queries are all tokens, as sequences: each prefix, and each response with the keys of its prefix repeated.

        Less work than whole groups when a group has many responses (best-of-16), whose tokens do not see each other;
        None otherwise. Forward only: gradients of duplicated keys are not accumulated.

        Example: a prefix of 100 tokens with 16 responses of 50. The whole group has 900 x 900 = 810,000 mask cells; the
        sequences have 100 x 100 + 16 x 50 x 150 = 130,000.
        """
        prefixes = self.prefixes[self.tail_groups]
        # Prefixes, then responses: start and number of queries, and number of prefix keys before them.
        starts = np.concatenate([self.starts, self.tail_starts])
        lengths = np.concatenate([self.prefixes, self.tails])
        before = np.concatenate([np.zeros_like(self.prefixes), prefixes])
        heads = np.concatenate([self.starts, self.starts[self.tail_groups]])
        order = _buckets_of_similar_shape(lengths, before + lengths)
        # Mask cells with padding, of the sequences and of whole groups.
        cells = sum(len(each) * int(lengths[each].max()) * int((before + lengths)[each].max()) for each in order)
        whole = sum(bucket.index.numel() * bucket.index.shape[1] for bucket in self.all_tokens.buckets)
        if cells > _MAX_SPLIT_CELLS * whole:
            return None
        buckets, restore, row = [], np.empty(len(self.host_labels), np.int64), 0
        for each in order:
            rows, inside = _rows(each, starts, lengths)
            # Key j of a sequence is token j of the prefix; after the prefix, token j - first of the sequence itself.
            place = np.arange(int((before + lengths)[each].max()))[None, :]
            first, own = before[each][:, None], starts[each][:, None]
            keys = np.where(place < first, heads[each][:, None] + place, own + place - first)
            is_key = place < first + lengths[each][:, None]
            keys = np.where(is_key, keys, own)
            seen = np.where(is_key[:, :, None], self.host_labels[keys], -2)
            buckets.append(Bucket(self.put(rows), self.put(self.host_labels[rows]), self.put(keys), self.put(seen)))
            restore[rows[inside]] = row + np.flatnonzero(inside)
            row += rows.size
        return Queries(buckets, self.put(restore))

    @cached_property
    def rewards(self) -> Queries:
        """Queries are the reward tokens, one per response: query r is the last token of response r."""
        first = np.cumsum(self.num_tails) - self.num_tails
        labels = self.host_labels[self.tail_starts + self.tails - 1]  # [R, 3]
        buckets = []
        for groups, bucket in zip(self._order, self.all_tokens.buckets, strict=True):
            rows, _ = _rows(groups, first, self.num_tails)
            buckets.append(Bucket(self.put(rows), self.put(labels[rows]), bucket.index, bucket.labels))
        return Queries(buckets, self._restore(first, self.num_tails))

    def _restore(self, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
        restore = np.empty(int(lengths.sum()), np.int64)
        row = 0
        for groups in self._order:
            longest = int(lengths[groups].max())
            for group in groups:
                restore[starts[group] : starts[group] + lengths[group]] = np.arange(row, row + lengths[group])
                row += longest
        return self.put(restore)

    def once(self, name: Hashable, make: Callable[[], Part]) -> Part:
        """Return data that a kernel derives from this batch, computed by the first layer that needs it."""
        if name not in self._made:
            self._made[name] = make()
        found: Part = self._made[name]
        return found

    def put(self, array: np.ndarray) -> Tensor:
        """Copy to the device, asynchronously on a GPU."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _buckets_of_similar_shape(num_queries: np.ndarray, num_keys: np.ndarray) -> list[np.ndarray]:
    """Sequences in buckets of similar numbers of queries and keys; sequences without queries are skipped."""
    found = []
    rest = np.flatnonzero(num_queries > 0)
    rest = rest[np.lexsort((-num_keys[rest], -num_queries[rest]))]
    while len(rest):
        similar = num_queries[rest] >= _MIN_FILL * num_queries[rest[0]]
        similar[similar] &= num_keys[rest[similar]] >= _MIN_FILL * num_keys[rest[similar]].max()
        found.append(rest[similar])
        rest = rest[~similar]
    return found


def _rows(groups: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, longest] rows of these groups, and a bool mask that is False for padding."""
    place = np.arange(lengths[groups].max())[None, :]
    inside = place < lengths[groups][:, None]
    first = starts[groups][:, None]
    return np.where(inside, first + place, first), inside


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated `arange(start, start + length)` of all pairs: [3, 10] and [2, 3] give [3, 4, 10, 11, 12]."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
