"""Collation: the token groups of one micro-batch become the tensors of a padding-free batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rm_gallery.data.tokenization.token_group import TokenGroup

# T tokens, G groups, R responses, C comparisons, S ratings, A attributes, L targets of a language model


@dataclass(frozen=True)
class PackedBatch:
    """Groups concatenated without padding: for each the common prefix, then the responses.

    Example, two groups with prefixes [a b] and []:

        input_ids    a b | c d | e || f | g h
        positions    0 1   2 3   2    0   0 1
        group        0 0   0 0   0    1   1 1
        response    -1 -1  0 0   1    2   3 3      (-1: common prefix)
        reward_index           3   4    5     7
        group_lengths  5, 3          tail_lengths  (2, 1), (1, 2)

    Comparison 0 > 1 of the second group is better = [2], worse = [3]. A batch may be empty (T = G = R = C = 0).
    """

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: position in the whole text; every response starts right after the common prefix of its group."""
    group: Tensor
    """[T] int64: the group of each token, as an index into this batch."""
    response: Tensor
    """[T] int64: the response of each token, as an index into this batch; -1 in a common prefix."""
    reward_index: Tensor
    """[R] int64: index of the last token of each response, whose hidden state gives the reward."""
    better: Tensor
    """[C] int64: the preferred response of each comparison, as an index into this batch."""
    worse: Tensor
    """[C] int64."""
    weight: Tensor
    """[C] float32."""
    margin: Tensor
    """[C] float32; NaN where the data have none."""
    p_better: Tensor
    """[C] float32: share of annotators who prefer `better`; NaN where the data have none."""
    tied: Tensor
    """[C] bool: neither response of the comparison is better."""
    rated: Tensor
    """[S] int64: the response of each rating, as an index into this batch; a response may have several, or none."""
    rated_group: Tensor
    """[S] int64: equal for the ratings of one group of the data."""
    attributes: Tensor
    """[S, A] float32: the attributes of each rating; NaN where the data have none. [0, 0] without ratings."""
    rank: Tensor
    """[S] float32: lower is better; NaN where the data are no rankings."""
    rating_weight: Tensor
    """[S] float32."""
    group_lengths: tuple[int, ...]
    """[G] tokens of each group; on the host, so that no kernel has to be waited for."""
    tail_lengths: tuple[tuple[int, ...], ...]
    """[G] tuples of the tokens of each response after the common prefix; on the host."""
    target_source: Tensor = field(default_factory=lambda: _int64([]))
    """[L] int64, ascending: the token whose hidden state predicts a target. The last token of a common prefix predicts
    the first token of each response, so it may occur several times."""
    target_token: Tensor = field(default_factory=lambda: _int64([]))
    """[L] int64: token id of the target."""
    target_weight: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[L] float32: sum of the weights of the texts of which it is a target."""
    target_times: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[L] float32: in how many texts it is a target; a common prefix has the tokens of several."""
    target_texts: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[R] float32: how many conversations of the data each response is; [0] without targets."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device, copied asynchronously where the device supports it."""
        if self.input_ids.device == device:
            return self
        tensors: dict[str, Any] = {
            # Copies to a GPU are asynchronous only from pinned memory.
            name: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def collate(groups: Sequence[TokenGroup]) -> PackedBatch:
    """Concatenate groups; see `PackedBatch` for an example."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    last_tokens: list[int] = []
    better: list[int] = []
    worse: list[int] = []
    weight: list[float] = []
    margin: list[float] = []
    p_better: list[float] = []
    tied: list[bool] = []
    rated: list[tuple[int, int, float, float]] = []
    attributes: list[tuple[float, ...]] = []
    groups_before = 0
    group_lengths: list[int] = []
    end = 0
    for group in groups:
        start, first = end, len(last_tokens)
        size = len(group.prefix)
        ids.append(group.prefix)
        positions.append(np.arange(size))
        responses.append(np.full(size, -1))
        end += size
        for tail in group.tails:
            ids.append(tail)
            positions.append(np.arange(size, size + len(tail)))
            responses.append(np.full(len(tail), len(last_tokens)))
            end += len(tail)
            last_tokens.append(end - 1)
        for comparison in group.comparisons:
            better.append(first + comparison.better)
            worse.append(first + comparison.worse)
            weight.append(comparison.weight)
            margin.append(math.nan if comparison.margin is None else comparison.margin)
            p_better.append(math.nan if comparison.p_better is None else comparison.p_better)
            tied.append(comparison.tied)
        rated += [
            (
                first + each.response,
                groups_before + each.group,
                each.weight,
                math.nan if each.rank is None else each.rank,
            )
            for each in group.ratings
        ]
        attributes += [each.attributes for each in group.ratings]
        groups_before += 1 + max((each.group for each in group.ratings), default=0)
        group_lengths.append(end - start)
    (source, token, times), target_weight = _all_targets(groups, group_lengths)
    return PackedBatch(
        input_ids=_int64(ids),
        positions=_int64(positions),
        group=torch.from_numpy(np.repeat(np.arange(len(groups)), np.array(group_lengths, np.int64))),
        response=_int64(responses),
        reward_index=torch.tensor(last_tokens, dtype=torch.int64),
        better=torch.tensor(better, dtype=torch.int64),
        worse=torch.tensor(worse, dtype=torch.int64),
        weight=torch.tensor(weight, dtype=torch.float32),
        margin=torch.tensor(margin, dtype=torch.float32),
        p_better=torch.tensor(p_better, dtype=torch.float32),
        tied=torch.tensor(tied, dtype=torch.bool),
        rated=torch.tensor([each[0] for each in rated], dtype=torch.int64),
        rated_group=torch.tensor([each[1] for each in rated], dtype=torch.int64),
        attributes=torch.tensor(attributes, dtype=torch.float32).reshape(
            len(rated), len(attributes[0]) if rated else 0
        ),
        rank=torch.tensor([each[3] for each in rated], dtype=torch.float32),
        rating_weight=torch.tensor([each[2] for each in rated], dtype=torch.float32),
        group_lengths=tuple(group_lengths),
        tail_lengths=tuple(tuple(len(tail) for tail in group.tails) for group in groups),
        target_source=torch.from_numpy(source),
        target_token=torch.from_numpy(token),
        target_weight=torch.from_numpy(target_weight.astype(np.float32)),
        target_times=torch.from_numpy(times.astype(np.float32)),
        target_texts=_times(groups) if len(source) else torch.zeros(0),
    )


def _all_targets(groups: Sequence[TokenGroup], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`_targets` of all groups, whose numbers of tokens are `lengths`."""
    starts = np.cumsum([0, *lengths])
    found = [_targets(group, int(start)) for group, start in zip(groups, starts, strict=False) if group.spans]
    return (
        np.concatenate([np.zeros((3, 0), np.int64), *(each[0] for each in found)], 1),
        np.concatenate([np.zeros(0), *(each[1] for each in found)]),
    )


def _targets(group: TokenGroup, start: int) -> tuple[np.ndarray, np.ndarray]:
    """[3, L] int64: source, token and number of texts of the targets of a group whose first token is `start` in the
    batch; and [L] float64: the sum of the weights of these texts.

    Example, prefix [a b] with the responses [c] and [d], and spans from 1 on: b after a is of 2 texts; c and d, both
    after b, are of one.
    """
    size = len(group.prefix)
    tail_starts = np.cumsum([start + size, *(len(tail) for tail in group.tails)])
    sources, tokens = [], []
    for span in group.spans:
        before = np.arange(span.first, span.last) - 1  # positions in the whole text
        sources.append(np.where(before < size, start + before, tail_starts[span.response] + before - size))
        text = np.concatenate([group.prefix, group.tails[span.response]])
        tokens.append(text[span.first : span.last])
    keys = np.concatenate(sources).astype(np.int64) << 32 | np.concatenate(tokens).astype(np.int64)
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    weights = np.repeat([span.weight for span in group.spans], [span.last - span.first for span in group.spans])
    return np.stack([found >> 32, found & 0xFFFFFFFF, counts]), np.bincount(inverse, weights, len(found))


def _times(groups: Sequence[TokenGroup]) -> Tensor:
    """[R] float32: how often the data have each response as a conversation, since its spans are listed as often."""
    found = []
    for group in groups:
        counts = Counter((span.response, span.first, span.last) for span in group.spans)
        found += [
            max((count for (response, *_), count in counts.items() if response == number), default=0)
            for number in range(len(group.tails))
        ]
    return torch.tensor(found, dtype=torch.float32)


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64))
