"""Attention's view of one packed batch: the mask rule, and the groups sorted into buckets of similar length.

Everything is worked out on the host from lengths the host knows, and copied to the device without waiting for it.
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

_WORTH_CUTTING = 0.5  # of the cells of whole groups: then responses by themselves are less work, gathered keys included
_MIN_FILL = 0.75  # a bucket's shortest group has at least this share of its longest one's tokens


def visible(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """The attention rule. q: [..., Q, 3] and k: [..., K, 3] hold (group, response, position); gives bool [..., Q, K].

    window: a layer's sliding window, in tokens of the text that the token stands in.
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
    """[B, Q] int64 rows of the query matrix; places past a group's end repeat its first one."""
    query_labels: Tensor
    """[B, Q, 3] their (group, response, position)."""
    index: Tensor
    """[B, L] int64 tokens whose keys and values they see; places past a group's end repeat its first token."""
    labels: Tensor
    """[B, L, 3] their (group, response, position); group -2 in the places past the end, which no query sees."""


@dataclass(frozen=True)
class Queries:
    """Some tokens of a batch as queries over the keys of their groups, in buckets."""

    buckets: list[Bucket]
    restore: Tensor
    """[number of queries] where each query went in the buckets' rows, laid one after the other."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """(bucket, window) -> bool [B, 1, Q, L], filled as layers ask."""
    biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """The same with a type: 0 and minus infinity."""

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
    """One batch as attention sees it: made once, used by every layer. Parts are worked out when a kernel asks."""

    def __init__(
        self, group_lengths: Sequence[int], tail_lengths: Sequence[Sequence[int]], device: torch.device, kernel: str
    ) -> None:
        """group_lengths, tail_lengths: those of a PackedBatch. kernel: the setting `model.attention`."""
        self.device, self.kernel = device, kernel
        self._made: dict[Hashable, Any] = {}
        self.lengths = np.array(group_lengths, np.int64)  # [G]
        self.starts = np.cumsum(self.lengths) - self.lengths  # [G]
        self.num_tails = np.array([len(tails) for tails in tail_lengths], np.int64)  # [G]
        self.tails = np.array([tail for tails in tail_lengths for tail in tails], np.int64)  # [R]
        tail_groups = np.repeat(np.arange(len(self.lengths)), self.num_tails)  # [R]
        self.prefixes = self.lengths - np.bincount(tail_groups, self.tails, len(self.lengths)).astype(np.int64)  # [G]
        before = np.cumsum(self.tails) - self.tails  # tokens in tails of the whole batch
        self.tail_starts = before + np.cumsum(self.prefixes)[tail_groups]  # [R] in the batch
        self.tail_groups = tail_groups
        self.reward_index = self.put(self.tail_starts + self.tails - 1)
        """[R] the last token of each response."""

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest prefix with its longest response."""
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
        """Groups of each bucket, so that padding inside attention stays small."""
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
        """Every token asks."""
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
        """Every token asks, prefixes and responses by themselves: over the keys of their own texts, prefixes repeated.

        None where that is no less work than whole groups: it is for groups of many responses, as in best-of-16, most
        of whose tokens do not see each other. Without a way back for gradients of keys that are there twice.
        """
        prefixes = self.prefixes[self.tail_groups]
        # In the order prefixes, responses: where queries begin, how many, and how many keys stand before them.
        starts = np.concatenate([self.starts, self.tail_starts])
        lengths = np.concatenate([self.prefixes, self.tails])
        before = np.concatenate([np.zeros_like(self.prefixes), prefixes])
        heads = np.concatenate([self.starts, self.starts[self.tail_groups]])
        order = _like_shapes(lengths, before + lengths)
        cells = sum(len(each) * int(lengths[each].max()) * int((before + lengths)[each].max()) for each in order)
        whole = sum(bucket.index.numel() * bucket.index.shape[1] for bucket in self.all_tokens.buckets)
        if cells > _WORTH_CUTTING * whole:
            return None
        buckets, restore, row = [], np.empty(len(self.host_labels), np.int64), 0
        for each in order:
            rows, inside = _rows(each, starts, lengths)
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
        """Only the last token of each response asks: query row r is that of response r."""
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
        """What a kernel needs of this batch beside the buckets, made when its first layer asks."""
        if name not in self._made:
            self._made[name] = make()
        found: Part = self._made[name]
        return found

    def put(self, array: np.ndarray) -> Tensor:
        """To the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _like_shapes(num_queries: np.ndarray, num_keys: np.ndarray) -> list[np.ndarray]:
    """Sequences in buckets of like numbers of queries and of keys; none of those without queries."""
    found = []
    left = np.flatnonzero(num_queries > 0)
    left = left[np.lexsort((-num_keys[left], -num_queries[left]))]
    while len(left):
        alike = num_queries[left] >= _MIN_FILL * num_queries[left[0]]
        alike[alike] &= num_keys[left[alike]] >= _MIN_FILL * num_keys[left[alike]].max()
        found.append(left[alike])
        left = left[~alike]
    return found


def _rows(groups: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, longest] rows of these groups, and which of them are no padding."""
    place = np.arange(lengths[groups].max())[None, :]
    inside = place < lengths[groups][:, None]
    first = starts[groups][:, None]
    return np.where(inside, first + place, first), inside


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated `arange(start, start + length)` of all pairs: [3, 10] and [2, 3] give [3, 4, 10, 11, 12]."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
