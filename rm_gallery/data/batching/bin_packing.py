"""Bin packing under a token budget: for training, validation, scoring and estimates.

`Packer.pack` packs the groups of a step into the fewest micro-batches, the same number per rank, balanced by cost.
`Packer.pack_by_length` packs groups of similar length for inference on one rank.

In: token counts. Out: indices by rank and micro-batch. A pure function of its arguments, with integers and stable sorts
only, so that every rank computes the same result.

Example, `Packer(token_budget=10, world_size=2)` with five groups of 6, 5, 4, 3 and 2 tokens: 20 tokens need two
micro-batches, one per rank. Longest processing time first makes [6 3] and [5 4], with no room for the 2. Best fit
decreasing fills both: [6 4] and [5 3 2]. So rank 0 computes groups 0 and 2, rank 1 computes groups 1, 3 and 4.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import chain
from typing import TypeAlias, TypeVar

import numpy as np

from rm_gallery.data.token_cache.arrays import GroupSizes

# N groups of one step, or items; W ranks

Integer = TypeVar("Integer", int, np.ndarray)

Packs: TypeAlias = list[list[list[int]]]
"""`packs[rank][micro-batch]` is a list of group indices; all ranks have the same number of micro-batches."""

_MAX_IMBALANCE = 0.03  # of the slowest rank over the mean
_MIN_GROUPS_PER_RANK = 16  # with fewer, one more micro-batch would often not balance better
_LAYER_MATRICES = 12  # parameters of a layer's matrices / hidden_size^2 (Kaplan et al. 2020, table 1)


def attention_length(hidden_size: int) -> int:
    """Sequence length in tokens at which attention costs as much as the matrices of a layer.

    Per token, the forward pass of a layer takes 2 x 12 x hidden_size^2 FLOPs in matrices (Kaplan et al. 2020, "Scaling
    Laws for Neural Language Models", table 1) and 4 x hidden_size FLOPs per visible key, of which there are half the
    sequence length on average: 24 h^2 = 4 h x length / 2 gives a length of 12 h.
    """
    return _LAYER_MATRICES * hidden_size


@dataclass(frozen=True)
class Packer:
    """Packs groups into micro-batches, balanced by estimated cost."""

    token_budget: int
    """Maximum tokens of a micro-batch; a larger group gets a micro-batch alone."""
    world_size: int = 1
    padded: bool = False
    """For a model that pads: the budget counts padded tokens, and groups are packed by length."""
    attention_length: int = attention_length(4096)
    """Tokens; see `attention_length`. It affects the balance only, never the budget."""

    def tokens(self, sizes: GroupSizes) -> np.ndarray:
        """[N] int64: tokens that the model computes for each group; with padding, as if the group were alone."""
        return self.count_tokens(
            sizes.tokens.astype(np.int64), sizes.longest_text.astype(np.int64), sizes.num_responses.astype(np.int64)
        )

    def count_tokens(self, tokens: Integer, longest_text: Integer, num_responses: Integer) -> Integer:
        """Tokens that the model computes: with padding, every response is as long as the longest text."""
        return longest_text * num_responses if self.padded else tokens

    def costs(self, sizes: GroupSizes) -> np.ndarray:
        """[N] int64: estimated time of each group, in units of one token without attention.

        Attention adds length / `attention_length` to the 1 of the matrices. Every text counts as long as the longest
        of its group. Example: 1,000 tokens in texts of 500 with an attention_length of 1,000 cost 1,500.
        """
        return self.cost(self.tokens(sizes), sizes.longest_text)

    def cost(self, tokens: Integer, longest_text: Integer) -> Integer:
        """The cost of this number of tokens in texts of this length; see `costs`."""
        return tokens + tokens * longest_text // self.attention_length

    def pack(self, sizes: GroupSizes) -> Packs:
        """Micro-batches that hold every group once, within the budget unless a single group exceeds it."""
        if not len(sizes):
            return [[] for _ in range(self.world_size)]
        if self.padded:
            bins = self._runs(sizes)
            return self._deal(bins, self.pack_costs(bins, sizes))
        costs = self.costs(sizes)
        places, count = self._places(np.minimum(self.tokens(sizes), self.token_budget), costs)
        order = np.argsort(places, kind="stable").tolist()
        ends = np.cumsum(np.bincount(places, minlength=count)).tolist()
        bins = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return self._deal(bins, _sums(places, costs, count))

    def pack_by_length(self, sizes: GroupSizes) -> list[list[int]]:
        """Micro-batches of one rank for inference: groups sorted by their longest text, each filled in turn.

        Nothing has to be balanced, so groups of similar length go together: less padding, and attention over
        segments of similar length. Next-fit decreasing: a group that exceeds the budget starts the next micro-batch.

        Example, budget 100, groups of 30, 60, 20, 50 and 40 tokens with one response each:
        [60], [50 40], [30 20]. With padding 50 and 40 cost 2 x 50 = 100 tokens.
        """
        order = np.argsort(-sizes.longest_text.astype(np.int64), kind="stable")
        ones = np.ones(len(order), np.int64)
        tokens = sizes.longest_text[order].astype(np.int64) if self.padded else ones  # of each item
        items = sizes.num_responses if self.padded else sizes.tokens
        ends = np.cumsum(items[order], dtype=np.int64)
        bounds = cut_runs(tokens, tokens, ends, self.token_budget, self.token_budget)
        return [part.tolist() for part in np.split(order, bounds[:-1])] if bounds else []

    def _places(self, tokens: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, int]:
        """The micro-batch of each group, and the number of micro-batches over all ranks.

        Starts from the lower bound of that number and tries to balance by cost, then by tokens; if both overflow, best
        fit gives a number that is feasible. If the ranks are uneven, one more micro-batch per rank is tried.
        """
        # Lower bound: all tokens, and groups above half the budget, no two of which share a micro-batch.
        least = max(-(-int(tokens.sum()) // self.token_budget), int((2 * tokens > self.token_budget).sum()))
        count = self._rounded(least)
        tight: np.ndarray | None = None
        fewest: tuple[np.ndarray, int] | None = None
        while True:
            for by in (costs, tokens):
                places = longest_first(by, tokens, count, self.token_budget)
                if places is not None and self._is_even(places, costs, count):
                    return places, count
                if places is not None:
                    fewest = fewest or (places, count)
            tight = best_fit(tokens, self.token_budget) if tight is None else tight
            needed = self._rounded(int(tight.max()) + 1)
            if needed <= count:
                if self._is_even(tight, costs, count):
                    return tight, count
                fewest = fewest or (tight, count)
            if fewest is not None and count > fewest[1]:
                return fewest
            count = needed if fewest is None else count + self.world_size

    def _is_even(self, places: np.ndarray, costs: np.ndarray, count: int) -> bool:
        """Whether the slowest rank is within `_MAX_IMBALANCE` of the mean; too few groups always count as even."""
        if len(places) < _MIN_GROUPS_PER_RANK * self.world_size:
            return True
        bins = _sums(places, costs, count)
        loads = np.bincount(self._ranks(bins), bins)
        return bool(loads.max() <= (1 + _MAX_IMBALANCE) * loads.mean())

    def _rounded(self, count: int) -> int:
        return max(1, -(-count // self.world_size)) * self.world_size

    def _runs(self, sizes: GroupSizes) -> list[list[int]]:
        """Micro-batches of a model that pads: runs of the groups sorted by length, as few as the budget allows.

        A response costs as much as the longest of its run. Bisection on the maximum cost of a run finds the most even
        runs of that number.
        """
        order = np.argsort(-sizes.longest_text.astype(np.int64), kind="stable")
        longest = sizes.longest_text[order].astype(np.int64)
        each = self.cost(longest, longest)
        ends = np.cumsum(sizes.num_responses[order], dtype=np.int64)
        widest = int(each.max()) * int(ends[-1])
        count = self._rounded(len(cut_runs(longest, each, ends, self.token_budget, widest)))
        low, high = 0, widest  # invariant: with maximum cost `high`, at most `count` runs are needed
        while low + 1 < high:
            middle = (low + high) // 2
            fits = len(cut_runs(longest, each, ends, self.token_budget, middle)) <= count
            low, high = (low, middle) if fits else (middle, high)
        bounds = cut_runs(longest, each, ends, self.token_budget, high)
        runs = [part.tolist() for part in np.split(order, bounds[:-1])]
        return runs + [[] for _ in range(count - len(runs))]

    def _deal(self, bins: Sequence[list[int]], costs: np.ndarray) -> Packs:
        """Assign bins to ranks, most expensive first, so that concurrent micro-batches have similar costs."""
        packs: Packs = [[] for _ in range(self.world_size)]
        ranks = self._ranks(costs).tolist()
        for place in np.argsort(-costs, kind="stable").tolist():
            packs[ranks[place]].append(bins[place])
        return packs

    def _ranks(self, costs: np.ndarray) -> np.ndarray:
        """[bins] the rank of each bin, the same number for each rank.

        In rounds of `world_size` bins, most expensive first; in each round, the most expensive bin goes to the least
        loaded rank. Example, 2 ranks, costs 9, 7, 6, 5: round one 9 -> rank 0, 7 -> rank 1; round two 6 -> rank 1
        (loaded 7), 5 -> rank 0: 14 and 13.
        """
        order = np.argsort(-costs, kind="stable")
        ranks = np.empty(len(costs), np.int64)
        loads = np.zeros(self.world_size, np.int64)
        for start in range(0, len(costs), self.world_size):
            members = order[start : start + self.world_size]
            ranks[members] = np.argsort(loads, kind="stable")
            loads[ranks[members]] += costs[members]
        return ranks

    def pack_tokens(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        """[packs] int64: tokens that the model computes for each micro-batch."""
        place, index = _flat(packs)
        if not self.padded:
            return _sums(place, sizes.tokens[index], len(packs))
        return _sums(place, sizes.num_responses[index], len(packs)) * self._longest(packs, sizes)

    def pack_costs(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        """[packs] int64: estimated cost of each micro-batch; see `costs`."""
        if self.padded:
            return self.cost(self.pack_tokens(packs, sizes), self._longest(packs, sizes))
        place, index = _flat(packs)
        return _sums(place, self.costs(sizes)[index], len(packs))

    def _longest(self, packs: Sequence[Sequence[int]], sizes: GroupSizes) -> np.ndarray:
        place, index = _flat(packs)
        longest = np.zeros(len(packs), np.int64)
        np.maximum.at(longest, place, sizes.longest_text[index])
        return longest

    def step_cost(self, packs: Packs, sizes: GroupSizes) -> int:
        """Estimated time of a step whose ranks synchronize after every micro-batch; see `costs`.

        Example, micro-batches of cost 9 and 5 on rank 0, 7 and 6 on rank 1: max(9, 7) + max(5, 6) = 15.
        """
        at_once = list(chain.from_iterable(zip(*packs, strict=True)))
        return int(self.pack_costs(at_once, sizes).reshape(-1, self.world_size).max(axis=1).sum())


def _flat(packs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The micro-batch and the index of each group."""
    place = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    return place, np.fromiter(chain.from_iterable(packs), np.int64, len(place))


def _sums(place: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[count] int64: sums of the values by place; exact, since float64 represents these integers."""
    return np.bincount(place, values, minlength=count).astype(np.int64)


_MAX_SKIPPED = 64  # full bins tried for one item


def longest_first(costs: np.ndarray, tokens: np.ndarray, count: int, budget: int) -> np.ndarray | None:
    """[N] the bin of each item: longest processing time first, into the least loaded bin with room (Graham 1969, LPT).

    None if an item finds no room in the `_MAX_SKIPPED` least loaded bins.

    Example, 2 bins with room, costs 5, 4, 3, 3, 3: 5 -> bin 0, 4 -> bin 1, 3 -> bin 1 (7), 3 -> bin 0 (8), 3 -> bin 1
    (10): loads of 8 and 10.
    """
    order = np.argsort(-costs, kind="stable")
    # A heap of loads: load and bin number in one integer, `load << shift | number`, which compares faster than a pair.
    shift = count.bit_length()
    number = (1 << shift) - 1
    heap = list(range(count))
    rooms = [budget] * count
    chosen = []
    skipped: list[int] = []  # bins without room for the item; pushed back once it has a bin
    for cost, size in zip((costs[order] << shift).tolist(), tokens[order].tolist(), strict=True):
        while rooms[heap[0] & number] < size:
            skipped.append(heappop(heap))
            if not heap or len(skipped) > _MAX_SKIPPED:
                return None
        least_loaded = heap[0]
        place = least_loaded & number
        chosen.append(place)
        rooms[place] -= size
        heapreplace(heap, least_loaded + cost)
        while skipped:
            heappush(heap, skipped.pop())
    places = np.empty(len(costs), np.int64)
    places[order] = chosen
    return places


def best_fit(tokens: np.ndarray, budget: int) -> np.ndarray:
    """[N] the bin of each item: best fit decreasing, the largest item first into the fullest bin with room.

    Example, budget 10, items of 5, 5, 4, 3 and 3 tokens: bins [5 5] and [4 3 3].
    """
    order = np.argsort(-tokens, kind="stable")
    shift = len(tokens).bit_length()
    number = (1 << shift) - 1
    rooms: list[int] = []  # sorted: remaining room and bin number in one integer, as above
    chosen = []
    for size in (tokens[order] << shift).tolist():
        at = bisect_left(rooms, size)
        room = rooms.pop(at) if at < len(rooms) else (budget << shift) | len(rooms)
        chosen.append(room & number)
        insort(rooms, room - size)
    places = np.empty(len(tokens), np.int64)
    places[order] = chosen
    return places


def cut_runs(tokens: np.ndarray, costs: np.ndarray, ends: np.ndarray, budget: int, capacity: int) -> list[int]:
    """Ends of runs of sorted groups. A run has as many items as fit both limits, and at least one group.

    tokens, costs: [N] of one item of each group, descending; all items of a run count as much as those of its first
    group. ends: [N] items up to and including each group. An item is a padded response, or a token without padding.

    Example, budget 20 and no limit by cost, groups of 2, 1, 1 and 3 responses of 8, 6, 5 and 4 tokens: the first run
    has room for 20 // 8 = 2 responses, the second for 20 // 6 = 3, the third for 20 // 4 = 5: ends 1, 3, 4.
    """
    bounds, start, done = [], 0, 0
    while start < len(tokens):
        room = min(budget // int(tokens[start]), capacity // int(costs[start]))
        start = max(start + 1, int(np.searchsorted(ends, done + room, side="right")))
        done = int(ends[start - 1])
        bounds.append(start)
    return bounds
