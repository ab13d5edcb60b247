"""What attention kernels read of a packed batch: the visibility rule, and groups sorted into buckets of similar length.

All of it is computed on the host from lengths that the host knows, and copied to the device asynchronously.

Example of the rule: group 0 has the prefix [a b] and the responses [c d] and [e]; group 1 has the one response [f].

    token      a   b   c   d   e   f
    group      0   0   0   0   0   1
    response  -1  -1   0   0   1   2      -1: common prefix
    position   0   1   2   3   2   0

Token e sees a, b and e, but not c and d, which belong to another response.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from rm_gallery.modeling.attention.past import PastKeys

Part = TypeVar("Part")
Reach: TypeAlias = tuple["int | None", "int | None"]
"""(window, chunk) of a layer in tokens; None where there is none."""

# T tokens of the batch, G groups, R responses
# of a bucket: B groups (or sequences), Q queries and K keys of its longest one

_MAX_CELLS_SHARE = 0.5  # split by response if that computes at most this share of the attention scores of whole groups
_MIN_FILL = 0.75  # the shortest group of a bucket has at least this share of the tokens of its longest one


def visible(q: Tensor, k: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """The visibility rule. q: [..., Q, 3], k: [..., K, 3] hold (group, response, position); returns bool [..., Q, K].

    A query sees a key of its own group that is not after it, in the common prefix (response -1) or in its own response.
    window: a layer's sliding window, in tokens of the text (prefix and response). chunk: a text is divided into
    chunks of this many tokens, and a query sees its own chunk only.
    """
    group_q, response_q, position_q = q.unsqueeze(-2).unbind(-1)  # [..., Q, 1]
    group_k, response_k, position_k = k.unsqueeze(-3).unbind(-1)  # [..., 1, K]
    seen = (group_q == group_k) & (position_k <= position_q) & ((response_k == -1) | (response_k == response_q))
    if window is not None:
        seen = seen & (position_q - position_k < window)
    if chunk is not None:
        seen = seen & (position_q // chunk == position_k // chunk)
    return seen


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """What attention computes besides the visibility rule. A kernel declares the fields that it takes."""

    scaling: float
    """Factor on query-key products."""
    window: int | None = None
    """Sliding window of the layer in tokens; None for full attention."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) before the softmax."""
    sinks: Tensor | None = None
    """[H] a logit per head that the softmax includes, without a value."""
    dropout: float = 0.0
    """Dropout rate of attention probabilities; 0 outside training."""
    chunk: int | None = None
    """Tokens of a chunk in layers with chunked attention."""

    @property
    def reach(self) -> Reach:
        """What limits the keys of a query within its text."""
        return self.window, self.chunk


@dataclass(frozen=True)
class Bucket:
    """Groups of similar length, padded to the longest."""

    query_rows: Tensor
    """[B, Q] int64 rows of the query tensor; padding repeats the group's first row."""
    query_labels: Tensor
    """[B, Q, 3] their (group, response, position)."""
    key_tokens: Tensor
    """[B, K] int64 tokens whose keys and values these queries may see; padding repeats the group's first token."""
    key_labels: Tensor
    """[B, K, 3] their (group, response, position); padding has group -2, which no query sees."""


@dataclass(frozen=True)
class BucketedQueries:
    """Queries of a batch and the keys of their groups, in buckets."""

    buckets: list[Bucket]
    restore: Tensor
    """[number of queries] the row of each query in the concatenated [B x Q] rows of all buckets."""
    masks: dict[tuple[int, Reach], Tensor] = field(default_factory=dict)
    """(bucket, reach) -> bool [B, 1, Q, K]; computed by the first layer that needs it."""
    biases: dict[tuple[int, Reach, torch.dtype], Tensor] = field(default_factory=dict)
    """(bucket, reach, dtype) -> the mask as an additive bias: 0 and minus infinity."""

    def mask(self, bucket: int, reach: Reach) -> Tensor:
        key = (bucket, reach)
        if key not in self.masks:
            found = self.buckets[bucket]
            self.masks[key] = visible(found.query_labels, found.key_labels, *reach).unsqueeze(1)
        return self.masks[key]

    def bias(self, bucket: int, reach: Reach, dtype: torch.dtype) -> Tensor:
        key = (bucket, reach, dtype)
        if key not in self.biases:
            mask = self.mask(bucket, reach)
            self.biases[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, float("-inf")
            )
        return self.biases[key]


class PackLayout:
    """One batch as attention sees it. Built once per batch and shared by all layers; parts are computed on first use.

    Host arrays, for the batch `a b | c d | e || f | g h` (prefix [a b] with two responses; no prefix, two responses):

        lengths      [5, 3]        tokens of each group                          [G]
        starts       [0, 5]        first token of each group                     [G]
        prefixes     [2, 0]        tokens of each common prefix                  [G]
        num_tails    [2, 2]        responses of each group                       [G]
        tails        [2, 1, 1, 2]  tokens of each response after the prefix      [R]
        tail_groups  [0, 0, 1, 1]  group of each response                        [R]
        tail_starts  [2, 4, 5, 6]  first token of each response                  [R]
    """

    def __init__(
        self, group_lengths: Sequence[int], tail_lengths: Sequence[Sequence[int]], device: torch.device, kernel: str,
        past: PastKeys | None = None,
    ) -> None:  # fmt: skip
        """group_lengths, tail_lengths: those of a PackedBatch. kernel: the setting `model.attention`.

        past: keys and values that are known; the forward pass then has the other tokens only, N of T.
        """
        self.device, self.kernel, self.past = device, kernel, past
        self.reads_all = False
        """Whether the last layer computes all tokens, not only those that give the rewards."""
        self._cache: dict[Hashable, Any] = {}
        self.lengths = np.array(group_lengths, np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_tails = np.array([len(tails) for tails in tail_lengths], np.int64)
        self.tails = np.array([tail for tails in tail_lengths for tail in tails], np.int64)
        self.tail_groups = np.repeat(np.arange(len(self.lengths)), self.num_tails)
        tokens_in_tails = np.bincount(self.tail_groups, self.tails, len(self.lengths)).astype(np.int64)
        self.prefixes = self.lengths - tokens_in_tails
        # Before a response lie the responses before it and the prefixes of its group and of the groups before it.
        self.tail_starts = np.cumsum(self.tails) - self.tails + np.cumsum(self.prefixes)[self.tail_groups]
        self.known = np.zeros_like(self.lengths) if past is None else np.array(past.sizes, np.int64)
        """[G] tokens of each prefix whose keys and values are known."""
        self.computed = ranges(self.starts + self.known, self.lengths - self.known)
        """[N] the tokens that the forward pass has; all T without `past`."""
        last_tokens = self.tail_starts + self.tails - 1
        self.reward_index = self.to_device(last_tokens if past is None else self._place[last_tokens])
        """[R] the last token of each response, among those of the forward pass."""

    @cached_property
    def _place(self) -> np.ndarray:
        """[T] the place of each token among the computed ones; 0 for those that are not."""
        place = np.zeros(int(self.lengths.sum()), np.int64)
        place[self.computed] = np.arange(len(self.computed))
        return place

    @cached_property
    def computed_rows(self) -> Tensor:
        """`computed` on the device."""
        return self.to_device(self.computed)

    @cached_property
    def _known_rows(self) -> Tensor:
        return self.to_device(ranges(self.starts, self.known))

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens [T, H_kv, D] in a layer, from those of the computed ones [N, H_kv, D]."""
        assert self.past is not None
        return self.past.extend(layer, key, value, self.starts, self.computed_rows, self._known_rows)

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest text: a prefix with one response."""
        return int((self.prefixes[self.tail_groups] + self.tails).max(initial=0))

    @cached_property
    def host_labels(self) -> np.ndarray:
        """[T, 3] (group, response, position) of each token; response -1 in a common prefix."""
        labels = np.empty((int(self.lengths.sum()), 3), np.int64)
        labels[:, 0] = np.repeat(np.arange(len(self.lengths)), self.lengths)
        labels[:, 1] = -1
        labels[:, 2] = np.arange(len(labels)) - self.starts[labels[:, 0]]
        in_tails = ranges(self.tail_starts, self.tails)
        responses = np.repeat(np.arange(len(self.tails)), self.tails)
        labels[in_tails, 1] = responses
        # Positions of a response continue from the prefix, as if no other response stood between them.
        prefixes = self.prefixes[self.tail_groups]
        labels[in_tails, 2] = in_tails - (self.tail_starts - prefixes)[responses]
        return labels

    @cached_property
    def labels(self) -> Tensor:
        """`host_labels` on the device."""
        return self.to_device(self.host_labels)

    @cached_property
    def _bucket_groups(self) -> list[np.ndarray]:
        """The groups of each bucket, longest first, so that little padding is computed.

        Example: groups of 30, 100, 74 and 80 tokens. The longest has 100, so the first bucket takes 100 and 80 (at
        least 75). The next one takes 74 alone (30 is less than 55.5), the last one 30.
        """
        longest_first = np.argsort(-self.lengths, kind="stable")
        found = []
        while len(longest_first):
            lengths = self.lengths[longest_first]
            count = int((lengths >= _MIN_FILL * lengths[0]).sum())
            found.append(longest_first[:count])
            longest_first = longest_first[count:]
        return found

    @cached_property
    def all_tokens(self) -> BucketedQueries:
        """Queries are all tokens."""
        buckets = []
        for groups in self._bucket_groups:
            rows, is_real = _padded_rows(groups, self.starts, self.lengths)
            labels = self.host_labels[rows]  # [B, K, 3]
            key_labels = np.where(is_real[:, :, None], labels, -2)
            tokens = self.to_device(rows)
            buckets.append(Bucket(tokens, self.to_device(labels), tokens, self.to_device(key_labels)))
        return BucketedQueries(buckets, self._restore(self.starts, self.lengths))

    @cached_property
    def by_response(self) -> BucketedQueries | None:
        """Queries are all tokens; each prefix and each response is a sequence over the keys of its own text.

        Forward only: the keys of a prefix are repeated for each response, and gradients of the copies are not
        accumulated. None where whole groups are not much more work. Example: a prefix of 1,000 tokens with 16 responses
        of 100. The whole group has 2,600^2 = 6.8M scores, most of which are masked; split there are
        1,000^2 + 16 x 100 x 1,100 = 2.8M, which is 41%. A prefix of 1,000 with two such responses has
        1,200^2 = 1.4M against 1.2M: it stays whole.
        """
        # 1. Sequences, prefixes first and then responses: first query, queries, keys of the prefix, first of these.
        #    Of a prefix that is partly known, the rest is a sequence over the whole prefix.
        prefixes = self.prefixes[self.tail_groups]
        starts = np.concatenate([self.starts + self.known, self.tail_starts])
        lengths = np.concatenate([self.prefixes - self.known, self.tails])
        before = np.concatenate([self.known, prefixes])
        prefix_starts = np.concatenate([self.starts, self.starts[self.tail_groups]])
        # 2. Is it worth it?
        order = _similar_shapes(lengths, before + lengths)
        cells = sum(len(each) * int(lengths[each].max()) * int((before + lengths)[each].max()) for each in order)
        whole = sum(bucket.key_tokens.numel() * bucket.key_tokens.shape[1] for bucket in self.all_tokens.buckets)
        if self.past is None and cells > _MAX_CELLS_SHARE * whole:
            return None
        # 3. Keys of a sequence: those of its prefix, its own, padding.
        buckets, restore, row = [], np.empty(len(self.computed), np.int64), 0
        for each in order:
            rows, is_real = _padded_rows(each, starts, lengths)
            place = np.arange(int((before + lengths)[each].max()))[None, :]
            num_before, own = before[each][:, None], starts[each][:, None]
            keys = np.where(place < num_before, prefix_starts[each][:, None] + place, own + place - num_before)
            is_key = place < num_before + lengths[each][:, None]
            keys = np.where(is_key, keys, own)
            key_labels = np.where(is_key[:, :, None], self.host_labels[keys], -2)
            places = rows if self.past is None else self._place[rows]
            parts = places, self.host_labels[rows], keys, key_labels
            buckets.append(Bucket(*(self.to_device(part) for part in parts)))
            restore[places[is_real]] = row + np.flatnonzero(is_real)
            row += rows.size
        return BucketedQueries(buckets, self.to_device(restore))

    @cached_property
    def rewards(self) -> BucketedQueries:
        """Queries are the R reward tokens: row r of the query tensor is the last token of response r."""
        first = np.cumsum(self.num_tails) - self.num_tails
        labels = self.host_labels[self.tail_starts + self.tails - 1]  # [R, 3]
        buckets = []
        for groups, bucket in zip(self._bucket_groups, self.all_tokens.buckets, strict=True):
            rows, _ = _padded_rows(groups, first, self.num_tails)
            buckets.append(
                Bucket(self.to_device(rows), self.to_device(labels[rows]), bucket.key_tokens, bucket.key_labels)
            )
        return BucketedQueries(buckets, self._restore(first, self.num_tails))

    def queries(self, *, rewards_only: bool) -> BucketedQueries:
        """The buckets for the R reward tokens or for all tokens, split by response where no gradient is needed."""
        if rewards_only:
            return self.rewards
        if self.past is None and torch.is_grad_enabled():
            return self.all_tokens
        return self.by_response or self.all_tokens

    def _restore(self, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Where each query went in the concatenated rows of the buckets.

        Example: groups of 3 and 4 queries, which are query rows 0-2 and 3-6, in one bucket, longest first and padded:
        rows [3 4 5 6 | 0 1 2 0]. Queries 0-2 are rows 4-6, queries 3-6 are rows 0-3: [4, 5, 6, 0, 1, 2, 3].
        """
        restore = np.empty(int(lengths.sum()), np.int64)
        row = 0
        for groups in self._bucket_groups:
            longest = int(lengths[groups].max())
            for group in groups:
                restore[starts[group] : starts[group] + lengths[group]] = np.arange(row, row + lengths[group])
                row += longest
        return self.to_device(restore)

    def cached(self, name: Hashable, make: Callable[[], Part]) -> Part:
        """A kernel's own data of this batch, made by `make` on first use."""
        if name not in self._cache:
            self._cache[name] = make()
        found: Part = self._cache[name]
        return found

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy a host array, asynchronously on a GPU."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _similar_shapes(num_queries: np.ndarray, num_keys: np.ndarray) -> list[np.ndarray]:
    """Sequences in buckets of similar numbers of queries and of keys; sequences without queries are dropped."""
    found = []
    left = np.flatnonzero(num_queries > 0)
    left = left[np.lexsort((-num_keys[left], -num_queries[left]))]
    while len(left):
        fits = num_queries[left] >= _MIN_FILL * num_queries[left[0]]
        fits[fits] &= num_keys[left[fits]] >= _MIN_FILL * num_keys[left[fits]].max()
        found.append(left[fits])
        left = left[~fits]
    return found


def _padded_rows(groups: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, longest] rows of these groups, and bool [B, longest]: which of them are not padding."""
    place = np.arange(lengths[groups].max())[None, :]
    is_real = place < lengths[groups][:, None]
    first = starts[groups][:, None]
    return np.where(is_real, first + place, first), is_real


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated ranges: starts [7, 2] with lengths [3, 2] give [7, 8, 9, 2, 3]."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
